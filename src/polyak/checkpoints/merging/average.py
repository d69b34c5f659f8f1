"""`average_checkpoints`: any number of checkpoints in, any number of averages out, each byte read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from polyak.checkpoints.merging.execute import check_outputs, execute
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.prepare import (
    Input,
    Merge,
    PathLike,
    prepared,
    warn_of_lost_state,
    warn_of_stale,
)
from polyak.checkpoints.merging.rules import StockShare
from polyak.checkpoints.merging.spread import Spread, spread_of, warn_of_no_basin
from polyak.checkpoints.merging.stream import streamed
from polyak.checkpoints.merging.weights import Method, OutputWeights


@dataclass(frozen=True)
class MergeResult:
    """What `average_checkpoints` did.

    outputs: the paths. inputs: the paths, oldest first. weights: those of the inputs, per output.
    tensors: how many each output holds. bytes_read, bytes_written, seconds: of the whole.
    published: False when this was one of several parts and others are still at work.
    batchnorm: `none`, `stale` or `refreshed`. stock: of each output that is a Model Stock, how much of the
    mean it took; None for others, and where an earlier call had made it.
    """

    outputs: tuple[Path, ...]
    inputs: tuple[str, ...]
    weights: tuple[OutputWeights, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    published: bool
    batchnorm: str
    stock: tuple[StockShare | None, ...]


def average_checkpoints(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Iterable[Input],
    outputs: PathLike | Mapping[PathLike, Method],
    *,
    method: Method | None = None,
    dtype: str | torch.dtype | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base: PathLike | None = None,
    key: str | None = None,
    normalize: bool = False,
    shard_size: int | str = "5GB",
    max_memory: int | str = "128MiB",
    threads: int | None = None,
    part: str | None = None,
    format: str | None = None,
    dcp_files: int | None = None,
    dcp_key: str | None = None,
    keep_state: bool = False,
    steps_unit: str | None = None,
    steps_from: PathLike | None = None,
    resume: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    r"""Average checkpoints into new files, without loading them: $y_k = \sum_i c_{ki}\, x_i$.

    Sums run in float32 (float64 for float64) in the inputs' order, element by element, so the result
    is bitwise the same for any number of threads, and within half a unit in the last place of the
    output plus $N\, 2^{-24} \sum |c_i x_i|$ of the exact one, for $N$ inputs.

    Floating tensors are averaged. Integers, booleans, the vectors of spectral norm and BatchNorm
    statistics are the newest's; the latter are recorded as stale, with a `StaleStatistics` warning. Ties
    stay ties. State that is no tensor (`get_extra_state`) is the newest's in torch files, and is named in
    a warning where an output cannot hold it. Quantised tensors are refused, and so are adapters (LoRA and
    its kin) of separate runs. Every input that is given counts, but an average is refused beside its own
    inputs.

    Args:
        inputs: Checkpoints of one model: paths in any format `open_checkpoint` reads, or opened ones.
            They are put in the order of their training steps; those of unknown step go first.
            `polyak.checkpoints.select_checkpoints` finds them in folders and leaves copies out.
        outputs: One path, or a mapping of path -> method; all are written in one pass over the inputs.
            The suffix decides the format: `.safetensors`, a torch archive (`.pt .pth .bin .ckpt`), or
            none for a folder of shards with the newest input's configuration.
        method: How the one output is made, `"swa"` by default: a profile, its text
            (`"ema:half_life=3000"`), one weight per input in the order in which they were given,
            `polyak.checkpoints.OutputWeights`, or what combines separate fine-tunes: `Ties`, `Dare`,
            `ModelStock`, `Slerp`. The weights of a profile sum to 1. A list of weights must
            sum to 1, unless `normalize` or `base` is given. `OutputWeights` are used as they are,
            whatever their sum.
        dtype: Of the floating tensors as written, like `"bfloat16"`; by default that of the inputs.
        include: Name patterns: average only these tensors, and take all others from the newest.
        exclude: Name patterns: take these tensors from the newest.
        base: A checkpoint $b$ to add differences to: the result is $b + \sum_i c_i (x_i - b)$.
        key: Where the tensors are within the files, as `open_checkpoint` takes it; opened inputs have theirs.
        normalize: Divide lists of weights by their sum.
        shard_size: The size of a shard, where an output is a folder: bytes, or text like `"5GB"`.
        max_memory: What all buffers together may take.
        threads: By default one per core, at most 16.
        part: `"1/4"` does the first quarter of the work; the last of the four processes to finish publishes.
        format: Of the outputs that are folders: `"safetensors"`, the default, or `"dcp"`, which
            `torch.distributed.checkpoint.load` reads on any number of ranks.
        dcp_files: How many files a DCP folder has; by default as many as the newest input, if that is one.
        dcp_key: Where the tensors are in a DCP folder, like `"model"`; by default where they are in
            the newest input, and at the root if that is of another format.
        keep_state: Carry over what the newest DCP folder holds beside the model (optimizer, schedule).
        steps_unit: What a profile's lengths count, like `"tokens"`, in place of training steps: a column
            of `steps_from`, or the number after this word in the names (`step100-tokens4B`).
        steps_from: A CSV or JSONL file with the columns `step` (or `file`) and `steps_unit`.
        resume: Continue what was interrupted, to the same bytes.
        verify: Record the SHA-256 of the inputs in the output, then read the output back and check it.
        overwrite: Replace outputs that exist.
        progress: Called with the number of chunks done and the number of all chunks.

    Raises:
        ArgumentError: an option or weights outside their domain, steps that are unknown.
        MismatchError: tensors that do not line up, all of them by name.
        FormatError: a damaged, foreign or quantised file.
        NonFiniteError: a NaN or an infinity, with its tensor and its file.
        OutputError: an output exists, or cannot be written. Whatever is raised, no output has appeared.

    Source: Izmailov et al. 2018, arXiv 1803.05407 (SWA); Wortsman et al. 2022, arXiv 2203.05482 (soups).

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import load_file, save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (100, 200, 300):
    ...     save_file({"w": torch.full((2,), float(step))}, folder / f"step-{step}.safetensors")
    >>> done = average_checkpoints(folder.glob("*.safetensors"), folder / "swa.safetensors")
    >>> load_file(folder / "swa.safetensors")["w"].tolist()
    [200.0, 200.0]

    """
    options = MergeOptions(
        dtype=dtype,
        include=include,
        exclude=exclude,
        base=base,
        key=key,
        normalize=normalize,
        shard_size=shard_size,
        max_memory=max_memory,
        threads=threads,
        part=part,
        format=format,
        dcp_files=dcp_files,
        dcp_key=dcp_key,
        keep_state=keep_state,
        steps_unit=steps_unit,
        steps_from=steps_from,
        resume=resume,
        verify=verify,
        overwrite=overwrite,
        progress=progress,
    )
    return run_merge(inputs, outputs, options, method)


def run_merge(
    inputs: Iterable[Input],
    outputs: PathLike | Mapping[PathLike, Method],
    options: MergeOptions,
    method: Method | None = None,
    *,
    announce: Callable[[Merge, Spread | None], None] = lambda merge, spread: None,
) -> MergeResult:
    """As `average_checkpoints`; `announce` is called with the merge, laid out and checked, and its spread."""
    begin = time.perf_counter()
    with prepared(inputs, outputs, options, method) as merge:
        check_outputs(merge)
        warn_of_stale(merge)
        warn_of_lost_state(merge)
        spread = spread_of(merge)
        warn_of_no_basin(spread)
        announce(merge, spread)
        published = execute(merge)
        return _summary(merge, time.perf_counter() - begin, published=published)


def iter_averaged_tensors(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Iterable[Input],
    method: Method = "swa",
    *,
    dtype: str | torch.dtype | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base: PathLike | None = None,
    key: str | None = None,
    normalize: bool = False,
    into: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an average one by one, to write them elsewhere: (name, tensor).

    The arguments and errors are those of `average_checkpoints`. One tensor is in memory at a time, if
    the caller keeps none. Tied names are yielded once.

    into: tensors by name, such as a model's, in whose memory the result is made and which are yielded,
    where their dtype and shape are the result's and their values lie in one row in the host's memory.
    After an error some of them may be changed.

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (100, 200):
    ...     save_file({"w": torch.full((2,), float(step))}, folder / f"step-{step}.safetensors")
    >>> dict(iter_averaged_tensors(folder.glob("*.safetensors")))
    {'w': tensor([150., 150.])}
    """
    options = MergeOptions(
        dtype=dtype, include=include, exclude=exclude, base=base, key=key, normalize=normalize
    )
    with prepared(inputs, {"memory://averaged.safetensors": method}, options) as merge:
        warn_of_stale(merge, "FILE")
        yield from streamed(merge, into)
        for one in merge.all_inputs:
            one.check_unchanged()


def _summary(merge: Merge, seconds: float, *, published: bool) -> MergeResult:
    return MergeResult(
        outputs=tuple(one.target for one in merge.blueprints),
        inputs=tuple(one.path for one in merge.inputs),
        weights=merge.weights,
        tensors=len(merge.alignment.tensors),
        bytes_read=merge.bytes_read,
        bytes_written=merge.bytes_written,
        seconds=seconds,
        published=published,
        batchnorm=merge.batchnorm,
        stock=merge.stock,
    )
