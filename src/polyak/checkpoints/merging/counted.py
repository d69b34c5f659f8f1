"""Which of the checkpoints in one place count: a folder is not everything in it.

Beside the checkpoints of a run there are copies of them (`best`, `last`), averages of them, initial
weights. Those with a number count, each once, whatever its formats. Of the others an average and a copy
are left out, with a reason that is told; what remains unclear is refused, for the user to say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path, PurePath

from polyak.checkpoints.reading.folders import name_with_step, step_in_path
from polyak.checkpoints.reading.stored import Checkpoint, same_bytes
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.errors import ArgumentError, FormatError

LeftOut = dict[str, str]
"""Path -> why it does not count."""


def counted(found: Sequence[Checkpoint], *, named: bool) -> tuple[list[Checkpoint], LeftOut]:
    """Those that count, in natural order, and the others. named: each was named by the user, in order.

    Raises ArgumentError where it is unclear whether a file that nobody named counts.
    """
    ordered = list(found) if named else sorted(found, key=lambda one: natural_key(one.path))
    left_out: LeftOut = {}
    rest = _without_averages(ordered, left_out, named=named)
    numbered = _numbered(rest)
    if not named:
        numbered = _without_twins(numbered, left_out)
    numbered = without_repeats(numbered, left_out)
    rest = [one for one in rest if one.path not in left_out]
    if not named:
        _refuse_several_kinds(numbered)
    kept, unclear = list(numbered), []
    for one in [one for one in rest if one not in numbered]:
        likely = sorted(kept, key=lambda other: other.step != one.step)
        if twin := next((other for other in likely if is_copy(one, other)), None):
            left_out[one.path] = f"its tensors are those of {twin.path}"
        elif named or not numbered or _has_a_step_of_its_own(one, numbered):
            kept.append(one)
        elif one.tensors.keys().isdisjoint(numbered[0].tensors):
            left_out[one.path] = f"none of its tensors is in {numbered[0].path}"
        else:
            unclear.append(one)
    if unclear:
        raise _unclear(unclear, numbered)
    return [one for one in ordered if one in kept], left_out


def natural_key(path: str) -> list[tuple[int, str]]:
    """Sorts numbers as numbers: `a-9` comes before `a-10`."""
    parts = re.findall(r"\d+|\D+", path)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def shared_numbers(found: Sequence[Checkpoint]) -> list[int] | None:
    """The one number in which the names differ, for each; None if they differ in anything else."""
    names = [_label(one) for one in found]
    if len({_pattern(name) for name in names}) != 1:
        return None
    columns = [*zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)]
    differing = [column for column in columns if len(set(column)) > 1]
    return list(differing[0]) if len(differing) == 1 else None


def average_rank(one: Checkpoint) -> int:
    """0 for a checkpoint of training, 1 for an average that was saved while training, 2 for a merge."""
    if "polyak" not in one.metadata:
        return 0
    if not one.is_merged:
        return int("profile" in one.metadata)
    inputs = inputs_of(one)
    is_conversion = (
        len(inputs) == 1 and inputs[0].get("weight") == 1 and not inputs[0].get("average")
    )
    return 0 if is_conversion and "base" not in one.metadata else 2


def inputs_of(merged: Checkpoint) -> list[Mapping[str, object]]:
    """What a merge says of its inputs; empty where that cannot be read."""
    try:
        found = parse_json(b'{"inputs": %s}' % merged.metadata["inputs"].encode(), merged.path)
    except (KeyError, FormatError):
        return []
    inputs = found["inputs"]
    return [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []


def is_copy(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all tensors are equal, compared from the smallest on up to the first difference."""
    if (
        "://" not in one.path + other.path
        and Path(one.path).resolve() == Path(other.path).resolve()
    ):
        return True
    if one.tensors.keys() != other.tensors.keys() or one.ties != other.ties:
        return False
    if not one.tensors or one.refused or other.refused:
        return False
    pairs = [(tensor, other.tensors[name]) for name, tensor in one.tensors.items()]
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    return all(same_bytes(*pair) for pair in sorted(pairs, key=lambda pair: pair[0].nbytes))


def _without_averages(
    found: list[Checkpoint], left_out: LeftOut, *, named: bool
) -> list[Checkpoint]:
    """Averages do not count beside what they are averages of; where there is nothing else they do."""
    ranks = {one: average_rank(one) for one in found}
    lowest = min(ranks.values(), default=0)
    others = [one for one in found if ranks[one] == lowest]
    if named and sum(name_with_step(one.path) is not None for one in others) < 2:
        return found
    for one in found:
        if ranks[one] > lowest:
            left_out[one.path] = "it is an average that polyak wrote"
    return others


def _numbered(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those with a step in their names; else with one inside; else with any number that names share."""
    if by_name := [one for one in found if name_with_step(one.path) is not None]:
        return by_name
    if inside := _first_of_each([one for one in found if one.step is not None]):
        return inside
    groups = _grouped(found, lambda one: _pattern(_label(one)))
    return [
        one
        for pattern, group in groups.items()
        for one in group
        if "*" in pattern and len(group) > 1
    ]


def _first_of_each(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Without the copies of others of the same step: `best` and `last` may be both."""
    kept: list[Checkpoint] = []
    for one in found:
        if not any(one.step == other.step and is_copy(one, other) for other in kept):
            kept.append(one)
    return kept


def _has_a_step_of_its_own(one: Checkpoint, numbered: Sequence[Checkpoint]) -> bool:
    return one.step is not None and one.step not in {other.step for other in numbered}


def _without_twins(numbered: Sequence[Checkpoint], left_out: LeftOut) -> list[Checkpoint]:
    """Without copies under another kind of name: `best_acc_epoch_2.pth` beside `epoch_2.pth`."""
    kinds = _grouped(numbered, lambda one: _pattern(_label(one)))
    usual = max(kinds.values(), key=len, default=[])
    for one in numbered:
        same = [] if one in usual else [other for other in usual if other.step == one.step]
        if twin := next((other for other in same if is_copy(one, other)), None):
            left_out[one.path] = f"its tensors are those of {twin.path}"
    return [one for one in numbered if one.path not in left_out]


def without_repeats(found: Sequence[Checkpoint], left_out: LeftOut) -> list[Checkpoint]:
    """Without what has the number and the tensors of one before it: the same checkpoint in another format."""
    kept: dict[object, list[Checkpoint]] = defaultdict(list)
    for one in found:
        number = one.step if one.step is not None else tuple(re.findall(r"\d+", _label(one)))
        same = kept[number] if number != () else []
        others = [other for other in same if other.path != one.path]  # given twice: refused later
        if twin := next((other for other in others if is_copy(one, other)), None):
            left_out[one.path] = f"its tensors are those of {twin.path}"
        else:
            same.append(one)
    return [one for one in found if one.path not in left_out]


def _refuse_several_kinds(numbered: Sequence[Checkpoint]) -> None:
    """`model_1.pt` beside `ema_model_1.pt`, `checkpoint3.pt` beside `checkpoint_3_900.pt`."""
    kinds = _grouped(numbered, lambda one: _pattern(_label(one)))
    for pair in combinations(kinds.values(), 2):
        if _overlap(*pair) or {_unit(one) for kind in pair for one in kind} >= {"steps", "epochs"}:
            shown = " and ".join(f"{_shown(kind)} ('{_glob(kind[0])}')" for kind in pair)
            raise ArgumentError(
                f"There are checkpoints of two kinds: {shown}. Their numbers name the same steps, or "
                "count different things. Name one kind."
            )


def _overlap(a: Sequence[Checkpoint], b: Sequence[Checkpoint]) -> bool:
    """Whether they have a step in common; or a number, where one kind has more numbers than the other."""
    if {one.step for one in a} & {one.step for one in b} - {None}:
        return True
    counts, numbers = [], []
    for kind in (a, b):
        found = [re.findall(r"\d+", _label(one)) for one in kind]
        counts.append(len(found[0]))
        numbers.append({int(number) for one in found for number in one})
    return counts[0] != counts[1] and bool(numbers[0] & numbers[1])


def _unit(one: Checkpoint) -> str | None:
    """What the number in the name counts, where it is the step and the name says so."""
    if one.step != step_in_path(one.path):
        return None  # the step stands in the file
    if re.search(r"(?<![a-z])(step|iter|update|checkpoint|ckpt)", _label(one), re.IGNORECASE):
        return "steps"
    is_epoch = re.search(r"(?<![a-z])ep(och)?s?(?![a-z])", _label(one), re.IGNORECASE)
    return "epochs" if is_epoch else None


def _unclear(unclear: Sequence[Checkpoint], numbered: Sequence[Checkpoint]) -> ArgumentError:
    many = len(unclear) > 1
    return ArgumentError(
        f"{', '.join(one.path for one in unclear)}: {'these have' if many else 'this has'} no training "
        f"step of {'their' if many else 'its'} own, and other tensors than each of the "
        f"{len(numbered)} with a number ({_shown(numbered)}). Initial weights, an average, or the only "
        f"copy of a checkpoint? Name those that count, such as '{_glob(numbered[0])}', or move the "
        "others to another folder."
    )


def _grouped(
    found: Sequence[Checkpoint], key: Callable[[Checkpoint], str]
) -> dict[str, list[Checkpoint]]:
    groups = defaultdict(list)
    for one in found:
        groups[key(one)].append(one)
    return groups


def _label(one: Checkpoint) -> str:
    """The part of the path that tells it from others."""
    return name_with_step(one.path) or PurePath(one.path).name


def _pattern(label: str) -> str:
    """A name with stars for its numbers; Lightning adds -v1 where a name is taken."""
    return re.sub(r"\d+", "*", re.sub(r"-v\d+(?=\.\w+$)", "", label))


def _glob(one: Checkpoint) -> str:
    """The path with stars for the numbers in the part that tells it from others."""
    label = _label(one)
    stars = re.sub(r"\d+", "*", label)
    return ("[0-9]" * stars.startswith("*") + stars).join(one.path.rsplit(label, 1))


def _shown(found: Sequence[Checkpoint]) -> str:
    names = [_label(one) for one in found]
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")
