"""`average_checkpoints`: any number of checkpoints in, any number of averages out, each byte read once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from polyak.checkpoints.merging.engine import Job, Sink, Worker
from polyak.checkpoints.merging.execute import execute
from polyak.checkpoints.merging.options import Options, Settings
from polyak.checkpoints.merging.plan import Plan, Strip
from polyak.checkpoints.merging.prepare import Input, Merge, PathLike, prepared, warn_of_stale
from polyak.checkpoints.merging.weights import How, Recipe
from polyak.checkpoints.reading.stored import TORCH_DTYPES


@dataclass(frozen=True)
class Averaged:
    """What `average_checkpoints` did.

    outputs: the paths. inputs: the paths, oldest first. recipes: the weight of each input, per output.
    tensors: how many each output holds. bytes_read, bytes_written, seconds: of the whole.
    published: False when this was one of several parts and others are still at work.
    batchnorm: `none`, `stale` or `refreshed`.
    """

    outputs: tuple[Path, ...]
    inputs: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    published: bool
    batchnorm: str


def average_checkpoints(
    inputs: Iterable[Input], outputs: Mapping[PathLike, How], **options: Unpack[Options]
) -> Averaged:
    r"""Average checkpoints into new files, without loading them: $y_k = \sum_i c_{ki}\, x_i$.

    Sums run in float32 (float64 for float64) in the inputs' order, element by element, so the result
    is bitwise the same for any number of threads, and within half a unit in the last place of the
    output plus $N\, 2^{-24} \sum |c_i x_i|$ of the exact one, for $N$ inputs.

    inputs: checkpoints of one model in any format `open_checkpoint` reads, or opened ones; put in the order of their
    training steps. outputs: path -> how: a profile, its spelling (`"ema:half_life=3000"`), or weights in
    the order in which the inputs were given. All are written in one pass. The path's suffix decides:
    `.safetensors`, a torch archive (`.pt .pth .bin .ckpt`), or none for a folder with shards and the
    newest input's configuration.

    Floating tensors are averaged. Integers, booleans and BatchNorm statistics are the newest's; the
    latter are recorded as stale, with a `StaleStatistics` warning. Ties stay ties. Quantised tensors
    are refused, and so are LoRA adapters of separate runs.

    Options: dtype (of floating tensors; theirs unless given); include, exclude (name patterns: what is
    averaged, all else comes from the newest); base (a checkpoint: the result is
    $b + \sum c_i (x_i - b)$, and weights need not sum to 1); key (where the tensors lie within the
    files); normalize (divide weights by their sum); shard_size (of folders, 5GB); max_memory (of
    buffers, 128MiB); threads; part (`"1/4"`: this process does a quarter, the last one publishes);
    resume (go on with what was interrupted, to the same bytes); verify (SHA-256 of the inputs into the
    output, which is read back and checked); overwrite; progress (called with chunks done and in all).

    Raises ArgumentError (options, weights, unknown steps), MismatchError (tensors that do not line up,
    all named), FormatError (a damaged, foreign or quantised file), NonFiniteError (a NaN, with its
    tensor and file), OutputError (it exists, no room, no right). Until all is well nothing appears.

    Source: Izmailov et al. 2018, arXiv 1803.05407 (SWA); Wortsman et al. 2022, arXiv 2203.05482 (soups).

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import load_file, save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (100, 200, 300):
    ...     save_file({"w": torch.full((2,), float(step))}, folder / f"step-{step}.safetensors")
    >>> done = average_checkpoints(folder.glob("*.safetensors"), {folder / "swa.safetensors": "swa"})
    >>> load_file(folder / "swa.safetensors")["w"].tolist()
    [200.0, 200.0]
    """
    settings = Settings.of(options)
    begin = time.perf_counter()
    with prepared(inputs, outputs, settings) as merge:
        warn_of_stale(merge)
        published = execute(merge)
        return _summary(merge, time.perf_counter() - begin, published=published)


def iter_averaged_tensors(
    inputs: Iterable[Input], how: How, **options: Unpack[Options]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an average one by one, for whoever writes them elsewhere: (name, tensor).

    Takes and raises what `average_checkpoints` does; options that concern writing have no effect. One
    tensor is in memory at a time, if the caller keeps none. Tied names are yielded once.

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (100, 200):
    ...     save_file({"w": torch.full((2,), float(step))}, folder / f"step-{step}.safetensors")
    >>> dict(iter_averaged_tensors(folder.glob("*.safetensors"), "swa"))
    {'w': tensor([150., 150.])}
    """
    with prepared(inputs, {"memory://averaged.safetensors": how}, Settings.of(options)) as merge:
        warn_of_stale(merge, "FILE")
        for tensor in merge.alignment.tensors:
            memory = _Memory(tensor.nbytes)
            strip: Strip[Sink] = Strip()
            strip.add(memory, 0, tensor.nbytes)
            plan = Plan([tensor], merge.plan.chunk_bytes)
            paths = [one.path for one in merge.all_inputs]
            worker = Worker(Job(plan, merge.coefficients, [[strip]], paths))
            for index in range(len(plan)):
                worker.merge(plan[index], checksums=False)
            yield tensor.name, memory.as_tensor(tensor.dtype, tensor.shape)
        for one in merge.all_inputs:
            one.check_unchanged()


class _Memory:
    """An output that stays in memory."""

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)

    def write(self, offset: int, data: memoryview) -> None:
        self._bytes[offset : offset + len(data)] = data

    def as_tensor(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not self._bytes:
            return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        return torch.frombuffer(self._bytes, dtype=TORCH_DTYPES[dtype]).reshape(shape)


def _summary(merge: Merge, seconds: float, *, published: bool) -> Averaged:
    return Averaged(
        outputs=tuple(one.target for one in merge.blueprints),
        inputs=tuple(one.path for one in merge.inputs),
        recipes=merge.recipes,
        tensors=len(merge.alignment.tensors),
        bytes_read=merge.bytes_read,
        bytes_written=merge.bytes_written,
        seconds=seconds,
        published=published,
        batchnorm=merge.batchnorm,
    )
