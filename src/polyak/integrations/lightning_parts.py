"""What the Lightning adapter is made of: batches, one more validation, copies of states, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_folder
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from polyak.errors import ArgumentError, UsageError, require


def refuse(trainer: Any, callback: object, averaging: tuple[type, ...]) -> None:
    """Raise UsageError for a second averaging callback, and for a strategy that splits the weights."""
    others = [c for c in trainer.callbacks if isinstance(c, averaging) and c is not callback]
    if others or trainer.callbacks.count(callback) > 1:
        names = ", ".join(f"{type(c).__module__}.{type(c).__qualname__}" for c in others)
        raise UsageError(
            "The trainer has another callback that averages the weights and puts its own into the module: "
            f"{names or 'this one, twice'}. Remove it. For several averages give one callback several "
            "profiles: WeightAveraging({'swa': 'swa', 'short': 'ema:half_life=500'})."
        )
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise UsageError(
            f"WeightAveraging does not work with {type(trainer.strategy).__name__}, which keeps flat parts of "
            "the weights. Use ModelParallelStrategy, which shards with FSDP2, or 'ddp' if the model fits into "
            "each rank; or save checkpoints and average these afterwards: polyak average."
        )


def check_forward(module: Any, update_bn: object, forward: object) -> None:
    """Raise ArgumentError if update_bn has no way to run the module."""
    has_forward = type(module).forward is not LightningModule.forward
    require(
        update_bn is None or forward is not None or has_forward or "forward" in vars(module),
        f"update_bn= runs {type(module).__name__} on batches, and it has no forward(). Pass forward=, "
        "for example forward=lambda module, batch: module.net(batch[0]).",
    )


def chosen_optimizers(optimizers: Sequence[Any], chosen: int | Sequence[int] | None) -> list[Any]:
    """The optimizers whose steps count. Raises ArgumentError if that is not clear."""
    names = ", ".join(f"{i}: {type(o).__name__}" for i, o in enumerate(optimizers))
    require(
        chosen is not None or len(optimizers) == 1,
        f"The module has {len(optimizers)} optimizers ({names}), and which of them counts the steps is "
        "not known. Pass optimizer=, an index or a list of indices, and include= to average only the "
        "part of the module that it trains.",
    )
    wanted: list[Any] = list(chosen) if isinstance(chosen, Sequence) else [chosen or 0]
    if not wanted or not all(type(i) is int and 0 <= i < len(optimizers) for i in wanted):
        raise ArgumentError(
            f"optimizer is {chosen!r}; expected an index, or a list of indices, of the module's "
            f"optimizers ({names})."
        )
    return [optimizers[i] for i in wanted]


def check_whole(name: str, value: Any, least: int, also: str = "") -> None:
    """Raise ArgumentError unless it is a whole number from `least`, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(
        value is None or whole,
        f"{name} is {value!r}; expected a whole number from {least}{also}.",
    )


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Run the module as the trainer does, but outside inference mode, and give random numbers back."""
    with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
        yield


def batches(trainer: Any, wanted: int | Iterable[Any]) -> Iterator[Any]:
    """Batches on the module's device: as many of the training data as wanted, or those of a loader."""
    generators: dict[torch.Generator, Tensor] = {}  # from which loaders draw, and their states

    def begun_anew(loader: Any) -> Any:
        for owner in (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[generator] = generator.get_state()
        own = copy.copy(loader)  # the loader itself may be in the middle of an epoch
        own._iterator = None
        return own

    if isinstance(wanted, int):
        mode: Any = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
        anew = apply_to_collection(trainer.train_dataloader, DataLoader, begun_anew)
        drawn: Any = ((b, i) for b, _, i in islice(CombinedLoader(anew, mode), wanted))
    else:
        drawn = ((b, 0) for b in (begun_anew(wanted) if isinstance(wanted, DataLoader) else wanted))
    try:
        for batch, index in drawn:
            converted = trainer.precision_plugin.convert_input(batch)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=index)
    finally:
        for generator, state in generators.items():
            generator.set_state(state)


@contextmanager
def logged_below(prefix: str, trainer: Any, module: Any) -> Iterator[Any]:
    """A validation loop like that of the fit, whose callbacks do not see it; metrics get the prefix.

    A loop of its own, because Lightning's knows from its counters where in an epoch a file was saved.
    """
    log, callbacks, epoch_loop = module.log, trainer.callbacks, trainer.fit_loop.epoch_loop
    ours = epoch_loop.val_loop
    loop = type(ours)(trainer, ours._trainer_fn, ours._stage, verbose=False)
    for name in ("inference_mode", "_combined_loader", "_max_batches", "_last_val_dl_reload_epoch"):
        setattr(loop, name, getattr(ours, name))
    epoch_loop.val_loop, trainer.callbacks = loop, []
    vars(module)["log"] = lambda name, *args, **kwargs: log(prefix + name, *args, **kwargs)
    try:
        yield loop
    finally:
        del vars(module)["log"]
        epoch_loop.val_loop, trainer.callbacks = ours, callbacks


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the tensors in a state dict, in the memory of the CPU."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def held_once(state: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with those tensors that are held anyway and have the same values: files hold them once."""
    by_name = {name: held.get(name.replace("_orig_mod.", "")) for name in state}
    return {n: by_name[n] if _same(by_name[n], value) else value for n, value in state.items()}


def equal(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts hold the same tensors."""
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    return state.keys() == other.keys() and all(_same(state[n], other[n]) for n in tensors)


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.dtype != other.dtype:
        return False
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


# Of a ModelParallelStrategy, which may write a folder for torch.distributed.checkpoint: only what is in its
# state_dict goes through there, the rest is written by the first rank.

IN_FOLDER = "state_dict.polyak"


def writes_folders(trainer: Any) -> bool:
    """Whether checkpoints are folders to which each rank writes its part."""
    of = trainer.strategy
    return isinstance(of, ModelParallelStrategy) and bool(of._save_distributed_checkpoint)


def gathered(states: Any) -> Any:
    """States whose tensors are whole, for a file that one rank writes; every rank must call this."""
    return apply_to_collection(
        states, Tensor, lambda t: t.full_tensor() if isinstance(t, DTensor) else t
    )


def load_raw(trainer: Any, module: LightningModule, raw: Mapping[str, Any] | None) -> None:
    """Give the module the weights that trained, from a checkpoint or, if None, from its folder."""
    if raw is None:
        live = {"state_dict": {"polyak": {"raw": get_model_state_dict(module)}}}
        load_folder(live, checkpoint_id=trainer.ckpt_path)
        raw = live["state_dict"]["polyak"]["raw"]
    elif isinstance(trainer.strategy, ModelParallelStrategy):
        options = StateDictOptions(full_state_dict=True, strict=module.strict_loading)
        set_model_state_dict(module, dict(raw), options=options)
        return
    # What the module's own on_save_checkpoint left out is as the module has it now.
    module.load_state_dict({**module.state_dict(), **raw}, strict=module.strict_loading)
