"""What the Lightning adapter is made of: hooks that run on the average, batches, copies of states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from polyak.errors import ArgumentError, UsageError, require


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


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Run the module as the trainer does, but outside inference mode, and give random numbers back."""
    from lightning.pytorch.utilities.seed import isolate_rng

    with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
        yield


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


def chosen_optimizers(optimizers: Sequence[Any], chosen: int | Sequence[int] | None) -> list[Any]:
    """The optimizers whose steps count. Raises ArgumentError if that is not clear."""
    names = ", ".join(f"{i}: {type(o).__name__}" for i, o in enumerate(optimizers))
    if chosen is None:
        require(
            len(optimizers) == 1,
            f"The module has {len(optimizers)} optimizers ({names}), and which of them counts the steps is "
            "not known. Pass optimizer=, an index or a list of indices, and include= to average only the "
            "part of the module that it trains.",
        )
        chosen = 0
    wanted: list[Any] = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
    if not wanted or not all(type(i) is int and 0 <= i < len(optimizers) for i in wanted):
        raise ArgumentError(
            f"optimizer is {chosen!r}; expected an index, or a list of indices, of the module's optimizers "
            f"({names})."
        )
    return [optimizers[i] for i in wanted]


@contextmanager
def validation_logged_below(prefix: str, trainer: Any, module: Any) -> Iterator[Any]:
    """A validation loop like that of the fit, whose callbacks do not see it; metrics get the prefix.

    A loop of its own, because Lightning's knows from its counters where in an epoch a file was saved.
    """
    log, callbacks, epoch_loop = module.log, trainer.callbacks, trainer.fit_loop.epoch_loop
    ours = epoch_loop.val_loop
    loop = type(ours)(trainer, ours._trainer_fn, ours._stage, verbose=False)
    for shared in (
        "inference_mode",
        "_combined_loader",
        "_max_batches",
        "_last_val_dl_reload_epoch",
    ):
        setattr(loop, shared, getattr(ours, shared))

    def log_below(name: str, *args: Any, **kwargs: Any) -> None:
        log(prefix + name, *args, **kwargs)

    epoch_loop.val_loop, trainer.callbacks = loop, []
    vars(module)["log"] = log_below
    try:
        yield loop
    finally:
        del vars(module)["log"]
        epoch_loop.val_loop, trainer.callbacks = ours, callbacks


def refuse(
    trainer: Any, callback: object, averaging: tuple[type, ...], sharded: tuple[type, ...]
) -> None:
    """Raise UsageError for a second averaging callback, and for a strategy that splits the weights."""
    others = [c for c in trainer.callbacks if isinstance(c, averaging) and c is not callback]
    if others or trainer.callbacks.count(callback) > 1:
        names = ", ".join(f"{type(c).__module__}.{type(c).__qualname__}" for c in others)
        raise UsageError(
            "The trainer has another callback that averages the weights and puts its own into the module: "
            f"{names or 'this one, twice'}. Remove it. For several averages give one callback several "
            "profiles: WeightAveraging({'swa': 'swa', 'short': 'ema:half_life=500'})."
        )
    if isinstance(trainer.strategy, sharded):
        raise UsageError(
            f"WeightAveraging does not work with {type(trainer.strategy).__name__} yet, which splits the "
            "weights among the ranks. Use strategy='ddp' if the model fits into each, or save checkpoints "
            "and average these afterwards: polyak average."
        )


def check_forward(module: Any, update_bn: object, forward: object) -> None:
    """Raise ArgumentError if update_bn has no way to run the module."""
    from lightning.pytorch import LightningModule

    own = type(module).forward is not LightningModule.forward or "forward" in vars(module)
    require(
        update_bn is None or forward is not None or own,
        f"update_bn= runs {type(module).__name__} on batches, and it has no forward(). Pass forward=, for "
        "example forward=lambda module, batch: module.net(batch[0]).",
    )


def check_whole(name: str, value: Any, least: int, also: str = "") -> None:
    """Raise ArgumentError unless it is a whole number from `least`, or None."""
    ok = value is None or (
        isinstance(value, int) and not isinstance(value, bool) and value >= least
    )
    require(ok, f"{name} is {value!r}; expected a whole number from {least}{also}.")


def own_copies(state: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what a module has put into a state dict itself: it may be lent."""
    known = {id(value) for value in ours.values()}
    return {n: v if id(v) in known else copied({n: v})[n] for n, v in state.items()}


def leave_out_frozen(checkpoint: dict[str, Any], averaged: Mapping[str, Any]) -> None:
    """What a module does not save, such as a frozen backbone, is not saved as a raw weight either."""
    current = checkpoint.get("current_model_state", {})
    for name in averaged.keys() - checkpoint["state_dict"].keys():
        if current.get(name) is averaged[name]:
            del current[name]
