"""The paths of a merge: what is read, what is written, and that the second never harms the first.

A merge laid out and checked in full, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from polyak.checkpoints.merging.align import Alignment, align, check_adapters
from polyak.checkpoints.merging.engine import Job, Sink, run
from polyak.checkpoints.merging.options import Settings
from polyak.checkpoints.merging.outputs import Blueprint, Contents, blueprint
from polyak.checkpoints.merging.plan import Plan, Strip, bytes_to_read, in_writing_order
from polyak.checkpoints.merging.weights import (
    How,
    Recipe,
    in_natural_order,
    metadata_of,
    recipe_for,
)
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, StaleStatistics, warn

PathLike = str | os.PathLike[str]


def checked_paths(inputs: Iterable[PathLike], outputs: Mapping[PathLike, How]) -> list[str]:
    """The inputs' paths; one path instead of many would be taken letter by letter."""
    if isinstance(inputs, (str, bytes, os.PathLike)):
        raise ArgumentError(
            f"inputs is one path, {inputs!r}; expected a list of checkpoints: [{inputs!r}] for this "
            "one alone, or Path(folder).glob('*') for those in a folder."
        )
    if not isinstance(outputs, Mapping):
        raise ArgumentError(
            f"outputs is {outputs!r}; expected a mapping of path to method, like "
            "{'averaged.safetensors': 'swa'}."
        )
    return [os.fspath(path) for path in inputs]


def refuse_twice(paths: Sequence[str], outputs: Mapping[PathLike, How]) -> None:
    """ArgumentError for nothing to read or write, and for what is named twice."""
    if not paths:
        raise ArgumentError("There is nothing to average: no input was given.")
    if not outputs:
        raise ArgumentError("There is nothing to write: no output was given.")
    resolved = [_resolved(path) for path in paths]
    twice = sorted({path for path in resolved if resolved.count(path) > 1})
    if twice:
        raise ArgumentError(
            f"Given twice as an input: {', '.join(twice)}. Use weights to count more."
        )
    targets = [_resolved(path) for path in outputs]
    if len(set(targets)) < len(targets):
        raise ArgumentError(f"Two outputs have the same path: {targets}.")


def refuse_replacing(outputs: Iterable[PathLike], inputs: Iterable[Checkpoint]) -> None:
    """ArgumentError where an output would take the place of an input, or of a folder that holds one."""
    read = {path for one in inputs for path in (one.path, *(file.path for file in one.files))}
    sources = {
        place: path
        for path in sorted(read)
        if "://" not in path
        for start in (Path(path).absolute(), Path(path).resolve())
        for place in (start, *start.parents)
    }
    for target in outputs:
        if (source := sources.get(Path(target).resolve())) is not None:
            raise ArgumentError(
                f"The output {os.fspath(target)} is an input, or holds one: {source}. Write to "
                "another name."
            )


def _resolved(path: str | os.PathLike[str]) -> str:
    """The path as far as the system can resolve it, to tell whether an input was given twice."""
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).resolve())


_PROBED_CHUNKS = 48


@dataclass(frozen=True, eq=False)
class Merge:
    """A merge that has been checked: `inputs` oldest first, the base (if any) in front of them.

    recipes, blueprints: one per output. batchnorm: as recorded in the outputs.
    """

    inputs: tuple[Checkpoint, ...]
    base: Checkpoint | None
    recipes: tuple[Recipe, ...]
    alignment: Alignment
    plan: Plan
    blueprints: tuple[Blueprint, ...]
    settings: Settings
    batchnorm: str

    @cached_property
    def identity(self) -> str:
        """Twelve hex digits of everything that the bytes of the outputs depend on."""
        everything = {
            "metadata": [dict(one.metadata) for one in self.blueprints],
            "targets": [str(one.target) for one in self.blueprints],
            "tensors": [
                (t.name, t.shape, t.dtype, t.mean) for s in self.plan.segments for t in s.tensors
            ],
            "inputs": [
                _stamp(file.path, file.size) for one in self.all_inputs for file in one.files
            ],
            "layout": [[(k, v[0].size) for k, v in one.layouts.items()] for one in self.blueprints],
            "chunk": self.plan.chunk_bytes,
        }
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]

    @property
    def all_inputs(self) -> tuple[Checkpoint, ...]:
        """The base, if there is one, and the inputs."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    @property
    def coefficients(self) -> list[list[float]]:
        """[output][input]; the base's is what the weights leave of 1: avg = base + sum c (x - base)."""
        rows = [list(recipe.weights) for recipe in self.recipes]
        return rows if self.base is None else [[_remainder(row), *row] for row in rows]

    @property
    def threads(self) -> int:
        """How many threads fit in the memory that was allowed."""
        return self.plan.threads_within(
            self.settings.max_memory, len(self.recipes), self.settings.threads
        )

    @property
    def memory(self) -> int:
        """Bytes of buffers at the peak, above what Python and torch take anyway."""
        return self.threads * self.plan.memory_per_thread(len(self.recipes))

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that are read."""
        return bytes_to_read(self.plan)

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs."""
        return sum(one.nbytes for one in self.blueprints)

    def job(self, outputs: Sequence[Sequence[Strip[Sink]]]) -> Job:
        """The engine's job, with a place for every segment of every output."""
        paths = [one.path for one in self.all_inputs]
        return Job(self.plan, self.coefficients, outputs, paths)

    def expected_seconds(self) -> float:
        """From a short probe: a few chunks are read and averaged, and nothing is written."""
        step = max(1, len(self.plan) // _PROBED_CHUNKS)
        chosen = range(0, len(self.plan), step)
        if not chosen:
            return 0.0
        nowhere = [[_nowhere(s.values * s.bytes_out) for s in self.plan.segments]] * len(
            self.recipes
        )
        begin = time.perf_counter()
        run(self.job(nowhere), iter(chosen), self.threads, lambda index, checksums: None)
        return (time.perf_counter() - begin) * len(self.plan) / len(chosen)


@contextmanager
def prepared(
    inputs: Iterable[PathLike], outputs: Mapping[PathLike, How], settings: Settings
) -> Iterator[Merge]:
    """Open the inputs and lay the merge out; they are closed when the block ends."""
    paths = checked_paths(inputs, outputs)
    refuse_twice(paths, outputs)
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path, settings)) for path in paths]
        base = (
            None if settings.base is None else stack.enter_context(_opened(settings.base, settings))
        )
        refuse_replacing(outputs, opened if base is None else [base, *opened])
        yield _laid_out(opened, base, outputs, settings)


def _laid_out(
    given: Sequence[Checkpoint],
    base: Checkpoint | None,
    outputs: Mapping[PathLike, How],
    settings: Settings,
) -> Merge:
    order = in_natural_order(given)
    inputs = tuple(given[index] for index in order)
    recipes = [recipe_for(how, inputs, order, settings) for how in outputs.values()]
    check_adapters(inputs)
    alignment = align(inputs if base is None else (base, *inputs), settings)
    tensors = in_writing_order(alignment.tensors)
    contents = Contents(tensors, alignment.ties, inputs[-1], settings.shard_size)
    batchnorm = _batchnorm(inputs, alignment)
    marks = {"batchnorm": batchnorm, "ties": json.dumps(alignment.ties)}
    blueprints = [
        blueprint(Path(path), contents, metadata_of(recipe, inputs, settings, marks))
        for path, recipe in zip(outputs, recipes, strict=True)
    ]
    plan = Plan(tensors)
    return Merge(
        inputs, base, tuple(recipes), alignment, plan, tuple(blueprints), settings, batchnorm
    )


def warn_of_stale(merge: Merge, file: str | None = None) -> None:
    """Warn where averaging leaves BatchNorm statistics that are the newest input's.

    file: stands for the output in the command that is shown.
    """
    first = merge.blueprints[0]
    written = shlex.quote(str(first.target / next(iter(first.layouts))))
    if merge.batchnorm == "stale" and len(merge.inputs) > 1:
        warn(
            "The BatchNorm statistics are those of the newest checkpoint and do not belong to the "
            f"averaged weights. Set them before use: polyak update-bn {file or written} "
            "--model package.module:function --data package.module:function",
            StaleStatistics,
        )


def _opened(path: str, settings: Settings) -> Checkpoint:
    return open_checkpoint(path, key=settings.key, strict=False)


def _batchnorm(inputs: Sequence[Checkpoint], alignment: Alignment) -> str:
    if not alignment.has_statistics:
        return "none"
    if len(inputs) > 1:
        return "stale"
    return inputs[0].metadata.get("batchnorm", "refreshed")


def _stamp(path: str, size: int) -> tuple[str, int, int]:
    """A file's path, size and time of change (0 for remote files)."""
    try:
        return path, size, Path(path).stat().st_mtime_ns
    except OSError:
        return path, size, 0


def _remainder(weights: Sequence[float]) -> float:
    """What the weights leave of 1; exactly 0 where that is only rounding."""
    rest = 1 - math.fsum(weights)
    return rest if abs(rest) > 1e-12 else 0.0


class _Nowhere:
    def write(self, offset: int, data: memoryview) -> None:
        """Drop it."""


def _nowhere(length: int) -> Strip[Sink]:
    strip: Strip[Sink] = Strip()
    strip.add(_Nowhere(), 0, length)
    return strip
