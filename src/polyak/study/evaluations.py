"""What every evaluation is held to: how it is told from others, how long it takes, what it returns."""

from __future__ import annotations

import hashlib
import inspect
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.errors import ArgumentError


def identity_of(evaluate: Any) -> str | None:
    """What tells an evaluation from others: its name and source, or what it says itself; None if unknown.

    What a closure, a partial or an object holds cannot be told, so its scores are not kept.
    """
    said = getattr(evaluate, "identity", None)
    if isinstance(said, str):
        return said
    if not isinstance(evaluate, FunctionType) or evaluate.__closure__:
        return None
    source = _source_file(evaluate)
    return source and f"{evaluate.__module__}:{evaluate.__qualname__} {source}"


def _source_file(written: FunctionType | type) -> str | None:
    """The digest of the file that it is written in: what it calls there counts too."""
    try:
        return _contents(Path(inspect.getsourcefile(written) or ""))
    except (OSError, TypeError):
        return None


def _contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TimedOut(BaseException):
    """Raised in the middle of an evaluation; not an Exception, which it might catch."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimedOut inside the block after so long; ArgumentError where that cannot be done."""
    if seconds is None:
        yield
        return
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        raise ArgumentError(
            f"timeout is {seconds:g}, but a function can be stopped only in the main thread of a POSIX system. "
            "Evaluate by a command, or leave out timeout=."
        )

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_scores(result: Any, what: str) -> Tensor:
    """What an evaluation returned as float64 on the CPU: a 0-d tensor, or 1-D with one score per example."""
    try:
        wide = (
            None if isinstance(result, Tensor) else torch.float64
        )  # a plain number has no float32
        found = torch.as_tensor(result, dtype=wide).detach().cpu()
        scores = None if found.is_complex() else found.double()
    except (TypeError, ValueError, RuntimeError):
        scores = None
    if scores is not None and scores.numel() == 1:
        return scores.reshape(())
    if scores is None or scores.ndim != 1 or len(scores) == 0:
        said = f"shape {tuple(scores.shape)}" if scores is not None else _kind_of(result)
        raise ArgumentError(
            f"The evaluation returned {said} for {what}; expected a number, or a 1-D tensor with one score per "
            "example."
        )
    return scores


def place_of(error: BaseException) -> str:
    """Where it was raised: file and line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "unknown place"


def _kind_of(result: Any) -> str:
    dtype = str(getattr(result, "dtype", "")).removeprefix("torch.")
    return f"{type(result).__name__} of {dtype}" if dtype else type(result).__name__


def model_identity(model: Module) -> str:
    """What tells a model from others beside its weights: its layers, and the files that their classes are in.

    torch's own files are not read; two models of one description and other code are two.
    """
    classes = {type(one) for one in model.modules()}
    own = [one for one in classes if not one.__module__.startswith("torch.")]
    sources = sorted({f"{one.__qualname__} {_source_file(one)}" for one in own})
    return "\n".join([f"{type(model).__qualname__} {model}", *sources])


def data_identity(data: Any) -> str:
    """What tells the data of `update_bn` from others, whatever order they are read in.

    Of a DataLoader its first example, their number and the size of its batches; of others the first batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        examples: Any = getattr(data, "dataset", None)
        first = examples[0] if hasattr(examples, "__getitem__") else next(iter(data), None)
    sizes = [len(one) for one in (examples, data) if hasattr(one, "__len__")]
    return f"{type(data).__qualname__} {sizes} {digest_of(first)}"


def digest_of(value: Any) -> str:
    """Of tensors in any nest of sequences and mappings; of other values as they print."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(str((value.dtype, value.shape)).encode() + raw).hexdigest()
    if isinstance(value, Mapping):
        return digest_of([part for pair in value.items() for part in pair])
    if isinstance(value, list | tuple):
        return hashlib.sha256("".join(map(digest_of, value)).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()
