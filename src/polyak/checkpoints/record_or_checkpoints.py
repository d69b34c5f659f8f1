"""Whether a folder that is averaged or searched means the record of a run or its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from polyak.checkpoints.intervals import records_in
from polyak.checkpoints.merging.counted import average_rank
from polyak.checkpoints.merging.finding import Finder
from polyak.checkpoints.merging.passed_over import is_weights_file
from polyak.checkpoints.reading.folders import is_record
from polyak.errors import ArgumentError, PolyakError, some


def means_record(inputs: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether this is one input, and a record or the folder of a run with a record inside.

    Averages that polyak wrote into a run's folder are not what is averaged. Raises ArgumentError if the
    folder holds checkpoints as well.
    """
    if len(inputs) != 1:
        return False
    folder = Path(inputs[0])
    if is_record(folder):
        return True
    records = records_in(folder) if folder.is_dir() else []
    beside = _checkpoints_in(folder) if records else []
    if beside:
        raise ArgumentError(
            f"{folder} holds {_described(folder, beside)}, and the record of a run: which of them is meant "
            f"is unclear. Name the record ({some(map(str, records))}), or {_advice(folder, beside)}."
        )
    return bool(records)


def _checkpoints_in(folder: Path) -> list[Path]:
    """What is to be averaged right there: no averages, and no record."""
    finder = Finder(None)
    try:
        found, _ = finder.expand(str(folder))
        return [Path(one.path) for one in found if not average_rank(one)]
    except (PolyakError, OSError):  # damaged ones are checkpoints too
        return sorted(filter(is_weights_file, folder.iterdir()))
    finally:
        finder.close_all_but(())


def _described(folder: Path, found: Sequence[Path]) -> str:
    if found == [folder]:
        return "weights of its own"
    return f"checkpoints ({some(path.name for path in found)})"


def _advice(folder: Path, found: Sequence[Path]) -> str:
    """What to type for the checkpoints."""
    if found == [folder]:
        return "the file of the weights, or move the record out of the folder"
    patterns = {path.parent / re.sub(r"\d+", "*", path.name) for path in found}
    named = (f"'{one}'" for one in sorted(patterns)) if len(found) > 1 else map(str, found)
    return f"the checkpoints ({some(named)})"
