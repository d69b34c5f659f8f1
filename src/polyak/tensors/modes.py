"""The training flags and plain attributes of a model's modules, restored after a block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module

_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (list, tuple, set, dict)
_SMALL = 64  # entries; larger containers are data, not flags


@contextmanager
def restored_modes(model: Module) -> Iterator[None]:
    """After the block every module's training flag is as it was, also after an error.

    The flags are written one by one, because an overridden `train()` may do more than set them.
    """
    modes = _modes(model)
    try:
        yield
    finally:
        _write_modes(modes)


@contextmanager
def evaluation_mode(model: Module) -> Iterator[None]:
    """The model in evaluation mode for the block; each module's own `train` brings it back."""
    entry = _modes(model)
    model.eval()
    try:
        yield
    finally:
        for module, training in entry:
            if module.training is not training:
                module.train(training)
        _write_modes(entry)


def set_mode(module: Module, *, training: bool) -> None:
    """Write the flag if it differs: assigning to a module costs as much as running a small layer."""
    if module.training is not training:
        module.training = training


class ActingModules:
    """A model whose modules may act on their weights, around a swap of other weights into it.

    Layers fold themselves into a frozen weight in `eval()` and out again in `train()`, or rescale
    their weights in the forward pass and note that in an attribute. What they did to the weights of
    one side must not be taken back from those of the other. So the swap happens in the state in
    which the layers have done nothing, training mode, and both sides get there and back by the
    model's own `train()`: `neutralise` and `resume` before and after swapping in, `leave` and
    `restore` before and after swapping out.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._acts = any(map(_acts_on_mode, model.modules()))
        self._entry = _modes(model)
        self._exit = self._entry

    def neutralise(self) -> None:
        """Undo on the present weights what evaluation mode did to them."""
        if self._acts:
            self._switch([(module, True) for module, _ in self._entry])
        self._neutral = _modes(self._model)
        self._attributes = [(m, _attributes(m)) for m in self._model.modules()]

    def resume(self) -> None:
        """The other weights are in the model: do to them what its modes do."""
        self._switch(self._entry)

    def leave(self) -> None:
        """The block is over: undo on the other weights what modes have done to them."""
        self._exit = _modes(self._model)
        self._switch(self._neutral)

    def restore(self, changed: set[int]) -> None:
        """The model's own weights are back: undo what was noted of the others, keep the user's modes.

        changed: the ids of tensors that were written to. What goes with that stands in the module that
        holds one, in the one above, or as a flag further up; numbers and lists further up are the
        loop's own, such as a best score.
        """
        for module, attributes in self._attributes if changed else ():
            near = _holds(module, changed)
            below = near or any(_holds(one, changed) for one in module.modules())
            for name, value in attributes.items():
                if (near or (below and type(value) is bool)) and _differs(module, name, value):
                    module.__dict__[name] = value
        if self._acts:
            _write_modes(self._neutral)
            self._switch(self._exit)

    def _switch(self, modes: list[tuple[Module, bool]]) -> None:
        """Let each module's own `train` bring it to its mode, parents before children."""
        if self._acts:
            for module, training in modes:
                if module.training is not training:
                    module.train(training)
            _write_modes(modes)


def _modes(model: Module) -> list[tuple[Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def _write_modes(modes: list[tuple[Module, bool]]) -> None:
    for module, training in modes:
        set_mode(module, training=training)


def _acts_on_mode(module: Module) -> bool:
    kind = type(module)
    return kind.train is not Module.train or kind.eval is not Module.eval


def _holds(module: Module, ids: set[int]) -> bool:
    """Whether one of these tensors is in the module, or in one that it holds."""
    return any(
        id(tensor) in ids
        for one in (module, *module.children())
        for tensor in (*one._parameters.values(), *one._buffers.values())
    )


def _differs(module: Module, name: str, value: Any) -> bool:
    return bool(module.__dict__.get(name, value) != value)


def _attributes(module: Module) -> dict[str, Any]:
    """Flags, numbers, words and small containers of a module, by name; not its training flag."""
    return {
        name: copy.copy(value) if isinstance(value, _CONTAINERS) else value
        for name, value in module.__dict__.items()
        if name not in _OF_MODULE and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    return kind in _CONTAINERS and len(value) <= _SMALL and all(type(v) in _PLAIN for v in value)


_OF_MODULE = frozenset(Module().__dict__) | {"training"}
