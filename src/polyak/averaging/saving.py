"""An average as a file: safetensors with provenance, written beside and then moved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from polyak.averaging.tracker import Following, Held
from polyak.averaging.values import copies, refuse_nonfinite_average
from polyak.errors import StaleStatistics, UsageError, warn
from polyak.files import refuse_existing, replacing
from polyak.tensors.names import named_tensors
from polyak.version import __version__

_HOST = torch.device("cpu")


def save(
    following: Following, held: Held, path: str | os.PathLike[str], *, overwrite: bool
) -> None:
    """Write the averaged model's tensors, each tied one once, and where they come from."""
    refuse_existing(Path(path), overwrite=overwrite)
    following.ready_to_read()
    if held.is_empty():
        raise UsageError("There is nothing to save: nothing has been averaged yet.")
    refuse_nonfinite_average(following, held, f"Not saved to {path}")
    status = batchnorm_status(following, held)
    if status == "stale":
        warn_stale()
    ties = named_tensors(following.roster.model).ties
    tensors = {
        n: t.contiguous() for n, t in copies(following, held, _HOST).items() if n not in ties
    }
    metadata = provenance(following, held) | {"batchnorm": status}
    if ties:
        metadata["ties"] = json.dumps(ties, sort_keys=True)
    with replacing(path, overwrite=overwrite) as part:
        save_file(tensors, part, metadata=metadata)
        _sort_header(part)


def _sort_header(path: Path) -> None:
    """Put the metadata in order; the header keeps its length.

    safetensors writes it in a random order, and equal runs are to give equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = {"__metadata__": header.pop("__metadata__")} | header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def provenance(following: Following, held: Held) -> dict[str, str]:
    """What the average is made of: strings, and no time of day, so that equal runs give equal files."""
    clock = held.clock.read()
    return {
        "format": "pt",
        "polyak": __version__,
        "profile": repr(held.profile),
        "unit": following.unit or "updates",
        "time": repr(clock.time),
        "count": repr(clock.count),
    }


def batchnorm_status(following: Following, held: Held) -> str:
    """'none' without running statistics, 'refreshed' if they are the average's own, or 'stale'."""
    if not following.roster.statistics:
        return "none"
    stale = following.statistics_go_stale() and not held.statistics_are_fresh
    return "stale" if stale else "refreshed"


def warn_stale() -> None:
    """Say that the BatchNorm statistics belong to other weights than the average."""
    warn(
        "The BatchNorm statistics of this average are those of the newest weights, not its own. Call "
        "average.update_bn(batches) before saving; the file says that they are stale.",
        StaleStatistics,
    )
