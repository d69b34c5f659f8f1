"""Running a model over batches: what a batch means, its device, and the progress."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from polyak.errors import ArgumentError, UsageError, require
from polyak.maths.arguments import at_least_one

Forward = Callable[[Module, Any], object]
_MOST_PASSES = 1000


def run(model: Module, batches: Iterable[Any], forward: Forward | None) -> int:
    """Run the model on every batch without gradients; returns how many there were."""
    device = _device_of(model)
    call, target = (forward, model) if forward else (_default_forward, _unwrapped(model))
    n_batches = 0
    with torch.no_grad():
        for batch in batches:
            call(target, moved(batch, device))
            n_batches += 1
    return n_batches


def feed(model: Module, batch: Any, forward: Forward | None) -> object:
    """What the model returns for one batch."""
    call, target = (forward, model) if forward else (_default_forward, _unwrapped(model))
    return call(target, moved(batch, _device_of(model)))


def checked(batches: Any, *, forward: object, limit: int | None, passes: int) -> Iterable[Any]:
    """Refuse what cannot be run before anything is touched."""
    at_least_one("passes", passes)
    require(passes <= _MOST_PASSES, f"passes is {passes}; expected at most {_MOST_PASSES}.")
    if limit is not None:
        at_least_one("limit", limit)
    if forward is not None and (not callable(forward) or isinstance(forward, Module)):
        raise ArgumentError(
            f"forward is a {type(forward).__name__}; expected a function of the model and a batch."
        )
    single = isinstance(batches, (Module, str, bytes, Mapping)) or getattr(batches, "ndim", 1) == 0
    if single or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"batches is a {type(batches).__name__}; expected an iterable of batches, such as a "
            "DataLoader. The order is polyak.update_bn(model, batches), the opposite of torch's."
        )
    if passes > 1 and isinstance(batches, Iterator):
        raise ArgumentError(
            f"passes={passes} reads the data several times, but an iterator can be read only once. "
            "Pass a list or a DataLoader."
        )
    iterable: Iterable[Any] = batches
    return iterable


def one_pass(batches: Iterable[Any], *, limit: int | None, title: str | None) -> Iterator[Any]:
    """The batches of one pass, at most `limit` of them fetched, with progress if there is a title.

    A generator: `iter(batches)` is not called before the pass begins.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    if limit is not None:
        total = limit if total is None else min(limit, total)
    limited = islice(batches, limit)
    yield from limited if title is None else _reported(limited, total, title)


def _reported(batches: Iterable[Any], total: int | None, title: str) -> Iterator[Any]:
    """The batches, with the progress written to stderr at most twice a second."""
    start = written = time.monotonic()
    done = 0
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if now - written >= 0.5:
            written = now
            sys.stderr.write(f"{title}: {_so_far(done, total, now - start)}\n")
    sys.stderr.write(f"{title}: {done} batches in {time.monotonic() - start:.1f} s\n")


def _so_far(done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{done} batches, {seconds:.0f} s"
    return f"{done} of {total} batches, {seconds / done * (total - done):.0f} s left"


def _default_forward(model: Module, batch: Any) -> object:
    """Pass a tensor as it is, a tuple or list by its first entry, a mapping as keywords."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ArgumentError("A batch is an empty tuple or list; expected (inputs, ...).")
        return model(batch[0])
    if not isinstance(batch, Mapping):
        return model(batch)
    try:
        return model(**batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        raise UsageError(
            f"The model does not take the batch's entries {sorted(map(str, batch))} as keyword "
            f"arguments ({error}). Pass forward=, for example "
            "forward=lambda model, batch: model(batch['image'])."
        ) from error


def _takes(model: Module, keywords: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**keywords)
    except TypeError:
        return False
    return True


def _unwrapped(model: Module) -> Module:
    """The model inside data-parallel wrappers, which broadcast buffers or copy layers at each call."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def _device_of(model: Module) -> torch.device | None:
    tensors = chain(model.parameters(), model.buffers())
    first = next((tensor for tensor in tensors if not tensor.is_meta), None)
    return None if first is None else first.device


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on the model's device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch
