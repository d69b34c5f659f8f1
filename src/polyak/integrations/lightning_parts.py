"""What the Lightning adapter is made of: hooks that run on the average, batches, copies of states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class _OnAverage:
    """A hook of the module that runs on the average; copied or pickled it is the module's own."""

    def __init__(self, run: Callable[..., Any], module: Any, name: str) -> None:
        self._run = run
        self._module = module
        self._hook = getattr(type(module), name)

    def __call__(self, *args: Any) -> Any:
        return self._run(MethodType(self._hook, self._module), *args)

    def __reduce__(self) -> Any:
        return MethodType, (self._hook, self._module)


def wrap_hooks(module: Any, hooks: Mapping[str, Callable[..., Any]]) -> None:
    """Let hooks of the module run by way of others, which get the hook itself and its arguments."""
    for name, run in hooks.items():
        vars(module)[name] = _OnAverage(run, module, name)


def unwrap_hooks(module: Any) -> None:
    """Let them run as they are again."""
    for name in [name for name, value in vars(module).items() if isinstance(value, _OnAverage)]:
        del vars(module)[name]


def batches(trainer: Any, wanted: int | Iterable[Any]) -> Iterator[Any]:
    """Batches on the module's device: as many of the training data as wanted, or those of a loader."""
    from lightning.pytorch.utilities import CombinedLoader

    source = trainer.train_dataloader if isinstance(wanted, int) else wanted
    generators = {id(g): g for g in _generators(source)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        mode: Any = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
        drawn = iter(
            CombinedLoader(_rewound(source), mode if isinstance(wanted, int) else "sequential")
        )
        for done, (batch, _, index) in enumerate(drawn, 1):
            converted = trainer.precision_plugin.convert_input(batch)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=index)
            if done == wanted:
                return
    finally:
        for generator, state in states:
            generator.set_state(state)


def _rewound(loaders: Any) -> Any:
    """Copies of loaders that begin anew, while the loaders themselves may be in the middle of an epoch."""
    if isinstance(loaders, Mapping):
        return {name: _rewound(loader) for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)) and all(isinstance(one, DataLoader) for one in loaders):
        return [_rewound(loader) for loader in loaders]
    if not isinstance(loaders, DataLoader):
        return loaders
    own = copy.copy(loaders)
    own._iterator = None
    return own


def _generators(loaders: Any) -> Iterator[torch.Generator]:
    """The generators of random numbers from which loaders draw their order."""
    several = loaders.values() if isinstance(loaders, Mapping) else loaders
    if isinstance(loaders, DataLoader):
        sampler = getattr(loaders.batch_sampler, "sampler", loaders.sampler)
        found = [getattr(owner, "generator", None) for owner in (loaders, loaders.sampler, sampler)]
        yield from (g for g in found if isinstance(g, torch.Generator))
    elif isinstance(several, Collection):
        for loader in several:
            yield from _generators(loader) if isinstance(loader, (DataLoader, Mapping)) else ()


def plain_name(name: str) -> str:
    """The name of a tensor in an average, which leaves out what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def shared_or_copied(value: Any, *held: Any) -> Any:
    """One of the tensors that are kept anyway, if it has this value; files then hold it once."""
    if not isinstance(value, Tensor):
        return value
    for tensor in held:
        if isinstance(tensor, Tensor) and _is_same(tensor, value):
            return tensor
    return value.detach().clone()


def _is_same(tensor: Any, other: Any) -> bool:
    if not (isinstance(tensor, Tensor) and isinstance(other, Tensor)):
        return bool(tensor is other)
    if (tensor.dtype, tensor.shape, tensor.device) != (other.dtype, other.shape, other.device):
        return False
    return torch.equal(tensor, other)


def equal(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts hold the same."""
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    return state.keys() == other.keys() and all(_is_same(state[n], other[n]) for n in tensors)


def copied(state: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """Copies of the tensors in a state dict."""
    return {
        name: value.detach().to(device or value.device, copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
