"""The judge of a record's averages: makes each, evaluates it once, and keeps its score."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.errors import PolyakError
from polyak.maths.profiles import Profile
from polyak.maths.text import as_profile, profile_text
from polyak.study.evaluator import Evaluator, Judging, PathLike, Subject, in_file
from polyak.study.filling import check_fits, has_statistics, tensors_of, weights_identity
from polyak.study.found import Scored
from polyak.study.plan import Plan
from polyak.study.scores import FOLDER
from polyak.study.trajectory import Trajectory

_FILE = "average.safetensors"


class Judge(Evaluator):
    """Scores averages of one record by one evaluation."""

    def __init__(self, trajectory: Trajectory, evaluate: Any, judging: Judging) -> None:
        newest = trajectory.intervals[-1]
        with newest.open() as opened:
            stale = "the newest interval" if has_statistics(opened.tensors) else None
        super().__init__(
            evaluate,
            judging,
            folder=None if trajectory.are_snapshots else trajectory.folder / FOLDER,
            question="search",
            stale=stale,
        )
        self.trajectory = trajectory
        self._made: dict[tuple[str, float], Scored | None] = {}
        self._scores: dict[Scored, Tensor] = {}
        self._contents: dict[Scored, str] = {}
        if judging.model is not None:
            check_fits(judging.model, newest)

    def score(
        self, profile: Profile | str, until: float, family: str, start: float | None = None
    ) -> Scored | None:
        """Its score; None, with a note, where it needs intervals that are missing."""
        text = profile if isinstance(profile, str) else profile_text(profile)
        if (text, until) not in self._made:
            self._made[text, until] = self._score(as_profile(profile), text, until, family, start)
        return self._made[text, until]

    def score_last(self, last: PathLike | Mapping[str, Tensor]) -> Scored:
        """The score of weights that are not in the record: the last iterate."""
        content = f"weights\x00{weights_identity(last)}"
        subject = Subject(
            "the last iterate",
            content,
            lambda into: tensors_of(last, into),
            lambda: in_file(tensors_of(last), _FILE),
        )
        return self._scored(
            subject, "the last iterate", "reference", None, self.trajectory.end, 0.0
        )

    def value(self, scored: Scored | None) -> float:
        """What to minimise: infinite where there is no score."""
        return math.inf if scored is None else self.loss(scored.score)

    def held_out(self, scored: Scored) -> Tensor | None:
        """Its scores on the held-out examples; None for a single number."""
        return self.split(self._scores[scored])[1]

    def are_same(self, one: Scored, other: Scored) -> bool:
        """Whether they are made of the same files with the same weights."""
        return self._contents[one] == self._contents[other]

    def _score(
        self, profile: Profile, text: str, until: float, family: str, start: float | None
    ) -> Scored | None:
        try:
            plan = self.trajectory.plan(profile, until)
        except PolyakError as error:
            self.notes.append(f"Left out: {str(error).splitlines()[0]}")
            return None
        subject = Subject(
            f"{text} at {until:g}",
            content_of(plan),
            lambda into: self.trajectory.tensors(plan, into=into),
            lambda: self._saved(plan),
        )
        return self._scored(subject, text, family, start, until, plan.error)

    @contextmanager
    def _saved(self, plan: Plan) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
            path = Path(folder) / _FILE
            self.trajectory.save(path, plan.profile, plan.until)
            yield path

    def _scored(
        self,
        subject: Subject,
        text: str,
        family: str,
        start: float | None,
        until: float,
        error: float,
    ) -> Scored:
        scores = self.scores(subject)
        choosing, held = self.split(scores)
        found = Scored(
            profile=text,
            family=family,
            start=start,
            until=until,
            score=float(choosing.mean()),
            held_out=None if held is None else float(held.mean()),
            error=error,
        )
        self._scores[found], self._contents[found] = scores, subject.content
        return found


def content_of(plan: Plan) -> str:
    """What an average is made of, wherever the record is: pieces that count, and the newest's buffers."""
    lines = [plan.unit]
    for index, piece in enumerate(plan.pieces):
        if piece.weight or index == len(plan.pieces) - 1:
            stat = piece.path.stat()
            lines.append(
                f"{piece.path.name} {piece.start!r} {piece.end!r} {piece.captures} {piece.weight!r} "
                f"{stat.st_size} {stat.st_mtime_ns}"
            )
    return "\n".join(lines)
