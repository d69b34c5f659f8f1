"""A merge laid out and checked in full, before anything is written: `prepared`.

What is written never harms what is read: no output takes the place of an input.
"""

from __future__ import annotations

import gc
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

from polyak.checkpoints.merging.adapters import check_adapters
from polyak.checkpoints.merging.align import Alignment, align
from polyak.checkpoints.merging.counted import inputs_of
from polyak.checkpoints.merging.dcp_output import (
    as_tensors,
    carried_from,
    dcp_blueprint,
    warn_of_left_out,
)
from polyak.checkpoints.merging.engine import Job, Sink, run
from polyak.checkpoints.merging.measure import Inputs
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.outputs import Blueprint, Contents, blueprint, by_component
from polyak.checkpoints.merging.plan import (
    CHUNK_BYTES,
    ByteRuns,
    MergePlan,
    bytes_to_read,
    in_writing_order,
)
from polyak.checkpoints.merging.rules import Rule, StockShare, WeightedSum
from polyak.checkpoints.merging.weights import (
    Method,
    OutputWeights,
    in_natural_order,
    metadata_of,
    weights_for,
)
from polyak.checkpoints.reading.dcp import DcpCheckpoint
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing.extra_state import warn_of_lost
from polyak.checkpoints.writing.layouts import TORCH_SUFFIXES
from polyak.errors import ArgumentError, StaleStatistics, require, warn
from polyak.files import as_path
from polyak.maths.profile import Profile

PathLike = str | os.PathLike[str]
Input = PathLike | Checkpoint
"""A checkpoint to average: its path, or the checkpoint as `open_checkpoint` returned it."""


def checked_inputs(inputs: Iterable[Input]) -> list[Input]:
    """The inputs as a list; a single string would be iterated character by character."""
    if isinstance(inputs, (str, bytes, os.PathLike, Checkpoint)):
        raise ArgumentError(
            f"inputs is one path, {inputs!r}; expected a list of checkpoints: [{inputs!r}] for this "
            "one alone, or Path(folder).glob('*') for those in a folder."
        )
    if not isinstance(inputs, Iterable):
        raise ArgumentError(f"inputs is {inputs!r}; expected a list of checkpoints.")
    found = list(inputs)
    for one in found:
        if not isinstance(one, Checkpoint):
            as_path(one)
    return found


def checked_outputs(
    outputs: PathLike | Mapping[PathLike, Method], method: Method | None
) -> Mapping[PathLike, Method]:
    """Path -> method, also of one path."""
    if isinstance(outputs, (str, os.PathLike)):
        outputs, method = {outputs: "swa" if method is None else method}, None
    if not isinstance(outputs, Mapping):
        raise ArgumentError(
            f"outputs is {outputs!r}; expected one path, or a mapping of path to method, like "
            "{'averaged.safetensors': 'swa'}."
        )
    if method is not None:
        raise ArgumentError(f"outputs names a method per path; leave out method={method!r}.")
    for path in outputs:
        if as_path(path) == Path():  # as the command line passes an empty name
            raise ArgumentError(
                "The output '.' names no file: it is the folder that this runs in, or an empty name. Is a variable "
                "of the shell not set?"
            )
    return outputs


def refuse_twice(paths: Sequence[str], outputs: Mapping[PathLike, Method]) -> None:
    """ArgumentError for nothing to read or write, and for what is named twice."""
    if not paths:
        raise ArgumentError("There is nothing to average: no input was given.")
    if not outputs:
        raise ArgumentError("There is nothing to write: no output was given.")
    resolved = [_resolved(path) for path in paths]
    twice = sorted({path for path in resolved if resolved.count(path) > 1})
    if twice:
        raise ArgumentError(
            f"Given twice as an input: {', '.join(twice)}. Give each once; to count one for more than the "
            "others, give it a larger weight."
        )
    targets = [_resolved(path) for path in outputs]
    if len(set(targets)) < len(targets):
        raise ArgumentError(f"Two outputs have the same path: {targets}.")


def refuse_own_average(inputs: Sequence[Checkpoint]) -> None:
    """ArgumentError where an earlier average is beside its own inputs, which would count twice."""
    paths = {_resolved(one.path): one.path for one in inputs}
    for one in inputs:
        recorded = [str(given.get("path", "")) for given in inputs_of(one) if one.is_merged]
        again = [paths[path] for path in map(_resolved, recorded) if path in paths]
        if again:
            raise ArgumentError(
                f"{one.path} is an average that polyak made of {', '.join(again)}, among others or alone, "
                "and these are inputs too: they would count twice. Leave it out, or give a weight per input."
            )


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
                f"The output {os.fspath(target)} is an input, or holds one: {source}. Choose another name."
            )


def _resolved(path: str | os.PathLike[str]) -> str:
    """The path as far as the system can resolve it, to tell whether an input was given twice."""
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).resolve())


_PROBED_CHUNKS = 48


@dataclass(frozen=True, eq=False)
class Merge:
    """A merge that has been checked: `inputs` oldest first, the base (if any) in front of them.

    weights, blueprints: one per output. batchnorm: as recorded in the outputs.
    """

    inputs: tuple[Checkpoint, ...]
    base: Checkpoint | None
    weights: tuple[OutputWeights, ...]
    alignment: Alignment
    plan: MergePlan
    blueprints: tuple[Blueprint, ...]
    options: MergeOptions
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
            "layout": [[(k, v.size) for k, v in one.layouts.items()] for one in self.blueprints],
            "places": [_digest(one) for one in self.blueprints],
            "chunk": self.plan.chunk_bytes,
        }
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]

    @property
    def all_inputs(self) -> tuple[Checkpoint, ...]:
        """The base, if there is one, and the inputs."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    @cached_property
    def rules(self) -> list[Rule]:
        """How each output is made of the inputs; combinations look at all of them first."""
        return [
            self._sum_of(one)
            if one.combination is None
            else one.combination.rule(
                Inputs(
                    self.alignment.tensors, one.coefficients, self.base is not None, self.threads
                )
            )
            for one in self.weights
        ]

    @property
    def stock(self) -> tuple[StockShare | None, ...]:
        """Of each output, as far as its rule was needed."""
        rules: list[Rule] = self.__dict__.get("rules", [])
        return tuple(rule.stock for rule in rules) or (None,) * len(self.weights)

    def _sum_of(self, one: OutputWeights) -> Rule:
        """The base's coefficient is what the others leave of 1: avg = base + sum c (x - base)."""
        row = list(one.coefficients)
        return WeightedSum(row if self.base is None else [_remainder(row), *row])

    @property
    def _reads(self) -> int:
        return max(1 if one.combination is None else one.combination.reads for one in self.weights)

    @property
    def _rows(self) -> int:
        return sum((one.combination or self._sum_of(one)).buffers for one in self.weights)

    @property
    def threads(self) -> int:
        """How many threads fit in the memory that was allowed."""
        return self.plan.threads_within(
            self.options.memory_bytes, self._rows, self.options.thread_count
        )

    @property
    def memory(self) -> int:
        """Bytes of buffers at the peak, above what Python and torch take anyway."""
        return self.threads * self.plan.memory_per_thread(self._rows)

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that are read."""
        return bytes_to_read(self.plan) * self._reads

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs."""
        return sum(one.nbytes for one in self.blueprints)

    def job(
        self, outputs: Sequence[Sequence[ByteRuns[Sink]]], rules: Sequence[Rule] | None = None
    ) -> Job:
        """The engine's job, with a place for every segment of every output."""
        paths = [one.path for one in self.all_inputs]
        return Job(self.plan, self.rules if rules is None else rules, outputs, paths)

    def expected_seconds(self) -> float:
        """From a short probe: a few chunks are read and averaged, and nothing is written.

        Combinations are taken for sums that read everything once more.
        """
        step = max(1, len(self.plan) // _PROBED_CHUNKS)
        chosen = range(0, len(self.plan), step)
        if not chosen:
            return 0.0
        nowhere = [[_nowhere(s.values * s.bytes_out) for s in self.plan.segments]] * len(
            self.weights
        )
        begin = time.perf_counter()
        sums = [self._sum_of(one) for one in self.weights]
        run(self.job(nowhere, sums), iter(chosen), self.threads, lambda index, checksums: None)
        return self._reads * (time.perf_counter() - begin) * len(self.plan) / len(chosen)


@contextmanager
def prepared(
    inputs: Iterable[Input],
    outputs: PathLike | Mapping[PathLike, Method],
    options: MergeOptions,
    method: Method | None = None,
) -> Iterator[Merge]:
    """Open the inputs and lay the merge out; what was opened here is closed when the block ends."""
    given, outputs = checked_inputs(inputs), checked_outputs(outputs, method)
    paths = [one.path if isinstance(one, Checkpoint) else os.fspath(one) for one in given]
    refuse_twice(paths, outputs)
    with ExitStack() as stack:
        with garbage_kept():
            opened = [
                one if isinstance(one, Checkpoint) else stack.enter_context(_opened(one, options))
                for one in given
            ]
            base = (
                None
                if options.base is None
                else stack.enter_context(_opened(options.base, options))
            )
            refuse_replacing(outputs, opened if base is None else [base, *opened])
            merge = _laid_out(opened, base, outputs, options)
        yield merge


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Pause Python's garbage collector within the block.

    A checkpoint of a thousand tensors is some ten thousand objects, and all of them stay. Looking
    through them for garbage again and again took half the time of opening a folder of checkpoints.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _laid_out(
    given: Sequence[Checkpoint],
    base: Checkpoint | None,
    outputs: Mapping[PathLike, Method],
    options: MergeOptions,
) -> Merge:
    order = in_natural_order(given, options)
    inputs = tuple(given[index] for index in order)
    weights = tuple(weights_for(one, inputs, order, options) for one in outputs.values())
    if any(isinstance(one, str | Profile) for one in outputs.values()):
        refuse_own_average(inputs)
    check_adapters(inputs)
    everything = inputs if base is None else (base, *inputs)
    averages = len(everything) > 1 or any(one.coefficients != (1.0,) for one in weights)
    alignment = align(everything, options, averages=averages)
    _refuse_idle_options(options, alignment, outputs.values())
    newest = inputs[-1]
    tensors = by_component(in_writing_order(alignment.tensors), newest)
    carried = carried_from(newest, options) if options.is_dcp else []
    tensors += as_tensors(carried, len(everything))
    contents = Contents(tensors, alignment.ties, newest, options.shard_bytes, options.written_dtype)
    batchnorm = _batchnorm(newest, alignment)
    marks = {"batchnorm": batchnorm, "ties": json.dumps(alignment.ties)}
    described = [metadata_of(one, inputs, options, marks) for one in weights]
    pairs = zip(map(Path, outputs), described, strict=True)
    blueprints = [
        dcp_blueprint(path, contents, carried, said, options)
        if options.is_dcp
        else blueprint(path, contents, said)
        for path, said in pairs
    ]
    combined = any(one.combination for one in weights)
    plan = MergePlan(
        tensors, CHUNK_BYTES // 4 if combined else CHUNK_BYTES
    )  # its rows stay in the cache
    return Merge(inputs, base, weights, alignment, plan, tuple(blueprints), options, batchnorm)


def _refuse_idle_options(
    options: MergeOptions, alignment: Alignment, methods: Iterable[Method]
) -> None:
    """ArgumentError for what cannot do what it says: patterns that leave nothing, sums that are 1."""
    filters = " and ".join(name for name in ("include", "exclude") if getattr(options, name))
    require(
        not (filters and alignment.averages) or any(tensor.mean for tensor in alignment.tensors),
        f"{filters} {'leave' if ' ' in filters else 'leaves'} nothing to average: all "
        f"{len(alignment.tensors)} tensors would be those of the newest. Convert that checkpoint alone, "
        "or let some tensors in.",
    )
    ready = (str, Profile, OutputWeights)
    require(
        not options.normalize or not all(isinstance(method, ready) for method in methods),
        "There is no list of weights to normalise; those of a method sum to 1 already. Leave out "
        "normalize=True.",
    )


def warn_of_lost_state(merge: Merge) -> None:
    """Warn of outputs that cannot hold the newest input's state that is no tensor."""
    newest = merge.inputs[-1]
    if merge.options.is_dcp and not merge.options.keep_state:
        warn_of_left_out(newest)
    if merge.options.is_dcp and isinstance(newest, DcpCheckpoint):
        return
    for one in merge.blueprints:
        is_torch = one.target.suffix.lower() in TORCH_SUFFIXES
        warn_of_lost(one.target, merge.inputs[-1].extra, is_torch=is_torch)


def warn_of_stale(merge: Merge, file: str | None = None) -> None:
    """Warn where averaging leaves BatchNorm statistics that are the newest input's.

    file: the name of the output in the command that is shown.
    """
    first = merge.blueprints[0]
    name = "" if first.described_in else next(iter(first.layouts))
    written = shlex.quote(str(first.target / name))
    if merge.batchnorm == "stale" and merge.alignment.averages:
        warn(
            "The BatchNorm statistics are those of the newest checkpoint and do not belong to the "
            f"averaged weights. Set them before use: polyak update-bn {file or written} "
            "--model package.module:function --data package.module:function",
            StaleStatistics,
        )


def _opened(path: PathLike, options: MergeOptions) -> Checkpoint:
    return open_checkpoint(path, key=options.key, strict=False)


def _batchnorm(newest: Checkpoint, alignment: Alignment) -> str:
    if not alignment.has_statistics:
        return "none"
    return "stale" if alignment.averages else newest.metadata.get("batchnorm", "refreshed")


def _digest(one: Blueprint) -> str:
    """Of what goes where, and of all that is beside the tensors."""
    digest = hashlib.sha256(json.dumps([*one.places]).encode())
    for name, content in one.sidecars.items():
        digest.update(name.encode() + content)
    return digest.hexdigest()


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


def _nowhere(length: int) -> ByteRuns[Sink]:
    runs: ByteRuns[Sink] = ByteRuns()
    runs.add(_Nowhere(), 0, length)
    return runs
