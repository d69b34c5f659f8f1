"""Lines, planes and rays through checkpoints: each point is made, refreshed, evaluated once, and kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from polyak.errors import ArgumentError, NonFiniteError, require
from polyak.maths.arguments import at_least_one, count, number
from polyak.study.axes import Axes, are_same, evenly, square
from polyak.study.bootstrap import paired_bootstrap
from polyak.study.curves import Curve, bezier, control_point
from polyak.study.directions import Directions, Normalize
from polyak.study.evaluator import Evaluator, Judging, PathLike, Subject
from polyak.study.filling import Weights
from polyak.study.frame import Anchor, Floats, Frame, anchors_of, counted
from polyak.study.principal import named_points, principal_points
from polyak.study.scans import Barrier, LineScan, PlaneScan, RayScan
from polyak.study.scores import FOLDER
from polyak.study.trajectory import Trajectory

Points = Mapping[str, Weights] | Sequence[Weights] | Trajectory
_MOST_POINTS = 1_000_000


def scan_line(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Points | Curve,
    evaluate: Callable[..., Any],
    *,
    curve: Weights | None = None,
    points: int = 21,
    beyond: float = 0.0,
    key: str | None = None,
    model: Module | None = None,
    data: Iterable[Any] | None = None,
    minimize: bool = False,
    maximize: bool = False,
    holdout: float = 0.5,
    cache: PathLike | bool | None = None,
    timeout: float | None = None,
    name: str | None = None,
) -> LineScan:
    r"""Scores on the way through checkpoints, and the barrier between each and the next.

    Args:
        inputs: Two or more checkpoints, paths or state dicts, in a list or by name; a `Curve`; or a
            `Trajectory`, for the way from its last interval to the mean of all.
        evaluate: As for `Trajectory.search`; best with one score per example, so that barriers get an interval.
        curve: The control point of a quadratic Bezier curve between two checkpoints, as
            `polyak.study.connect` trains it: $(1-t)^2 w_1 + 2t(1-t) \theta + t^2 w_2$ is followed instead of
            the straight line.
        points: On each segment, its two ends included.
        beyond: How far to go on beyond the first and the last, as a fraction of a segment.
        key: Where the weights are inside the files, as for `open_checkpoint`.
        model: The model to evaluate, in evaluation mode; it gets its own weights back.
        data: Training batches, to refresh the model's BatchNorm statistics at each point.
        minimize: Lower scores are better.
        maximize: Higher scores are better; needed unless the function has the name of a known metric.
        holdout: The share of the examples that a barrier is measured on and its position not chosen on.
        cache: A folder for scores, which another scan of the same points then knows; by default one in the
            record of a `Trajectory`, and none for checkpoints.
        timeout: Seconds for one evaluation.
        name: What tells this evaluation from others where its code does not: a closure, an object.

    Raises:
        ArgumentError: Fewer than two checkpoints, the same one twice, an option outside its domain, and what
            `Trajectory.search` raises for an evaluation.
        MismatchError: Tensors that do not line up, or are not those of `model`.
        NonFiniteError: A checkpoint holds NaN, or its own score is one.
        UsageError: The evaluation failed or took too long.

    >>> import torch
    >>> a, b = {"w": torch.tensor([-1.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}
    >>> found = scan_line({"a": a, "b": b}, lambda w: 1 - float(w["w"].square().sum()), minimize=True, points=3)
    >>> found.values.tolist(), found.barriers[0].height
    ([0.0, 1.0, 0.0], 1.0)

    """
    count("points", points, 3)
    require(0 <= number("beyond", beyond) < math.inf, f"beyond is {beyond:g}; expected 0 or more.")
    curved = isinstance(inputs, Curve) or curve is not None
    judging = Judging.of(locals())
    anchors = _line_anchors(inputs, curve, key, model)
    measuring = _Measuring(anchors, evaluate, judging, inputs)
    gram = measuring.frame.gram()
    _refuse_same(anchors, gram)
    names = [a.name for a in (anchors[::2] if curved else anchors)]
    share = bezier if curved else _polyline(len(anchors))
    segments = len(names) - 1
    _check_number(segments * points + 2 * beyond * points, "beyond= or points=")
    positions = _positions(segments, points, beyond)
    shares = [share(t) for t in positions.tolist()]
    subjects = [
        measuring.frame.subject(_between(names, t), s)
        for t, s in zip(positions.tolist(), shares, strict=True)
    ]
    scores = measuring.at(subjects, own=[one.what in names for one in subjects])
    barriers = tuple(
        measuring.barrier(names[i], names[i + 1], positions - i, scores) for i in range(segments)
    )
    return LineScan(
        names=tuple(names), positions=positions, distances=_lengths(positions, np.array(shares), gram),
        values=_means(scores), barriers=barriers, **measuring.about(scores),
    )  # fmt: skip


def scan_plane(  # noqa: PLR0913 - as above
    inputs: Points,
    evaluate: Callable[..., Any],
    *,
    points: int = 11,
    margin: float = 0.2,
    key: str | None = None,
    model: Module | None = None,
    data: Iterable[Any] | None = None,
    minimize: bool = False,
    maximize: bool = False,
    holdout: float = 0.5,
    cache: PathLike | bool | None = None,
    timeout: float | None = None,
    name: str | None = None,
) -> PlaneScan:
    r"""Scores on a plane: through three checkpoints, or a trajectory's own.

    $u$ points from the first checkpoint to the second, $v$ is orthogonal to it towards the third, both of length 1
    (Garipov et al. 2018, arXiv 1802.10026); further checkpoints are shown at the foot of their perpendicular. A
    trajectory's plane goes through the mean of its intervals along their two leading principal directions.

    Args:
        inputs: Three checkpoints or more, paths or state dicts, in a list or by name; or a `Trajectory`.
        evaluate: As for `Trajectory.search`.
        points: On each side of the square.
        margin: Beyond the outermost checkpoint on each side, as a fraction of the extent.
        key: Where the weights are inside the files, as for `open_checkpoint`.
        model: As for `scan_line`, and so are `data` to `name`.
        data: See `model`.
        minimize: See `model`.
        maximize: See `model`.
        holdout: See `model`.
        cache: See `model`.
        timeout: See `model`.
        name: See `model`.

    Raises what `scan_line` raises, and ArgumentError for fewer than three checkpoints, or three on one line.

    """
    require(0 <= number("margin", margin) < math.inf, f"margin is {margin:g}; expected 0 or more.")
    count("points", points, 3)
    _check_number(points**2, "points=")
    judging = Judging.of(locals())
    principal = None
    if isinstance(inputs, Trajectory):
        principal = principal_points(inputs)
    anchors = principal.anchors if principal else anchors_of(inputs, key=key, model=model)  # type: ignore[arg-type]
    if len(anchors) < 3:
        raise ArgumentError(f"{counted(anchors)}; a plane needs three.")
    measuring = _Measuring(anchors, evaluate, judging, inputs)
    frame = measuring.frame
    axes = Axes(frame)
    feet, distance = axes.feet() if principal is None else (principal.feet, principal.distance)
    x, y = square(np.vstack(list(feet.values())), points, margin)
    given = anchors[:1] if principal else anchors  # of a trajectory its mean
    own = [frame.subject(a.name, frame.at(i)) for i, a in enumerate(given)]
    places = [(a, b) for b in y.tolist() for a in x.tolist()]
    grid = [frame.subject(f"the point ({a:.4g}, {b:.4g})", axes.shares(a, b)) for a, b in places]
    scores = measuring.at([*own, *grid], own=[True] * len(own) + [False] * len(grid))[len(own) :]
    values = _means(scores).reshape(len(y), len(x))
    if not np.isfinite(values).any():
        raise NonFiniteError(
            f"None of the {values.size} points on the plane has a finite score, so there is nothing to draw. Pass "
            "a smaller margin=, or more points=."
        )
    return PlaneScan(
        x=x, y=y, values=values, points=feet, distance=distance,
        explained=principal.explained if principal else None, **measuring.about(scores),
    )  # fmt: skip


def scan_rays(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Points,
    evaluate: Callable[..., Any],
    *,
    rays: int = 10,
    points: int = 6,
    reach: float | None = None,
    normalize: Normalize = None,
    seed: int = 0,
    key: str | None = None,
    model: Module | None = None,
    data: Iterable[Any] | None = None,
    minimize: bool = False,
    maximize: bool = False,
    holdout: float = 0.5,
    cache: PathLike | bool | None = None,
    timeout: float | None = None,
    name: str | None = None,
) -> RayScan:
    """Scores along random rays from each of one or more checkpoints, in the same directions from each.

    Args:
        inputs: One checkpoint or more, paths or state dicts, in a list or by name; or a `Trajectory`, for its
            last interval and the mean of all.
        evaluate: As for `Trajectory.search`.
        rays: How many directions.
        points: On each ray, the centre included; it is evaluated once.
        reach: The longest distance. By default 0.6 of the length of the first checkpoint's weights; with
            `normalize="filter"`, where 1 is that length for every filter, 1.
        normalize: None for directions uniform on the unit sphere (Izmailov et al. 2018), "filter" for
            those of Li et al. 2018: as long as the weights, filter by filter, with tensors of one dimension at rest.
        seed: Of the directions.
        key: Where the weights are inside the files, as for `open_checkpoint`.
        model: As for `scan_line`, and so are `data` to `name`.
        data: See `model`.
        minimize: See `model`.
        maximize: See `model`.
        holdout: See `model`.
        cache: See `model`.
        timeout: See `model`.
        name: See `model`.

    With `model` the directions change its parameters and no float buffer. Raises what `scan_line` raises.

    """
    at_least_one("rays", rays)
    count("points", points, 2)
    count("seed", seed)
    judging = Judging.of(locals())
    anchors = _anchors(inputs, key, ("last", "mean"), model)
    require(bool(anchors), "There is no checkpoint; rays need one or more.")
    _check_number(len(anchors) * rays * points, "rays= or points=")
    measuring = _Measuring(anchors, evaluate, judging, inputs)
    directions = Directions(measuring.frame, normalize, seed)
    if reach is None:
        reach = 1.0 if normalize else 0.6 * measuring.frame.norm(0)
    require(
        0 < number("reach", reach) < math.inf, f"reach is {reach:g}; expected a positive distance."
    )
    distances = evenly(0, reach, points)
    values, everything = {}, []
    for index, anchor in enumerate(anchors):
        scores = _along(measuring, directions, index, rays, distances)
        values[anchor.name] = _means(scores).reshape(rays, points)
        everything += scores
    return RayScan(
        distances=distances, values=values, normalize=normalize, **measuring.about(everything)
    )


class _Measuring:
    """The points of one scan, and the evaluation that scores them."""

    def __init__(
        self,
        anchors: list[Anchor],
        evaluate: Callable[..., Any],
        how: Judging,
        inputs: Points | Curve,
    ) -> None:
        self.frame = Frame(anchors, how.model)
        kept = (
            inputs.folder / FOLDER
            if isinstance(inputs, Trajectory) and not inputs.are_snapshots
            else None
        )
        self.evaluator = Evaluator(
            evaluate, how, folder=kept, question="scan",
            stale="the nearest checkpoint" if self.frame.has_statistics else None,
        )  # fmt: skip

    def at(self, subjects: Sequence[Subject], own: Sequence[bool]) -> list[Tensor]:
        """The scores of points; the checkpoints themselves, which are `own`, come first and must have one."""
        found: dict[int, Tensor] = {}
        with self.evaluator.at_work():
            for index in sorted(range(len(subjects)), key=lambda i: not own[i]):
                scores = found[index] = self.evaluator.scores(subjects[index])
                if own[index] and not bool(torch.isfinite(scores).all()):
                    raise NonFiniteError(
                        f"The score of {subjects[index].what} is {float(scores.mean())}. Check the data and the "
                        "weights: a landscape is drawn around checkpoints that have a score."
                    )
        return [found[i] for i in range(len(subjects))]

    def barrier(self, start: str, end: str, t: Floats, scores: Sequence[Tensor]) -> Barrier:
        """Of the segment from 0 to 1 of `t`; scores at places outside of it do not count."""
        sign = 1.0 if self.evaluator.minimize else -1.0
        inside = [(float(p), sign * s) for p, s in zip(t, scores, strict=True) if 0 <= p <= 1]
        (_, first), (_, last) = inside[0], inside[-1]

        def heights(part: Callable[[Tensor], Tensor]) -> list[float]:
            a, b = part(first).mean(), part(last).mean()
            return [float(part(s).mean() - ((1 - p) * a + p * b)) for p, s in inside[1:-1]]

        over_all = heights(lambda s: s)
        finite = all(map(math.isfinite, over_all))
        top = (
            int(np.argmax(over_all))
            if finite
            else [math.isfinite(h) for h in over_all].index(False)
        )
        height = max(0.0, over_all[top]) if finite else math.inf
        found = Barrier(start, end, height, inside[1 + top][0])
        if self.evaluator.split(first)[1] is None or not finite:
            return found
        top = int(np.argmax(heights(lambda s: self.evaluator.split(s)[0])))
        chosen, path = inside[1 + top]
        held = [self._held(s) for s in (path, first, last)]
        chord = (1 - chosen) * held[1] + chosen * held[2]
        difference, low, high = paired_bootstrap(held[0], chord)
        return replace(found, chosen=chosen, difference=difference, low=low, high=high)

    def about(self, scores: Sequence[Tensor]) -> dict[str, Any]:
        """What every scan says."""
        lost = sum(not math.isfinite(float(s.mean())) for s in scores)
        notes = list(self.evaluator.notes)
        if lost:
            notes.append(f"{lost} of {len(scores)} points have no finite score.")
        return {
            "minimize": self.evaluator.minimize,
            "evaluations": self.evaluator.evaluations,
            "cached": self.evaluator.cached,
            "notes": tuple(notes),
        }

    def _held(self, scores: Tensor) -> Tensor:
        held = self.evaluator.split(scores)[1]
        return scores if held is None else held


def _along(
    measuring: _Measuring, directions: Directions, centre: int, rays: int, distances: Floats
) -> list[Tensor]:
    frame = measuring.frame
    name, shares = frame.anchors[centre].name, frame.at(centre)
    centres = [frame.subject(a.name, frame.at(i)) for i, a in enumerate(frame.anchors)]
    middle = measuring.at(centres, own=[True] * len(centres))[centre]
    found = []
    for ray in range(rays):
        pushes = directions.pushes(ray, centre, distances[1:].tolist())
        subjects = [
            frame.subject(f"ray {ray} from {name} at {push.distance:.4g}", shares, push)
            for push in pushes
        ]
        found += [middle, *measuring.at(subjects, own=[False] * len(subjects))]
    return found


def _anchors(
    inputs: Points, key: str | None, of_a_record: Sequence[str], model: object
) -> list[Anchor]:
    if isinstance(inputs, Trajectory):
        return anchors_of(named_points(inputs, of_a_record))
    return anchors_of(inputs, key=key, model=model)


def _line_anchors(
    inputs: Points | Curve, curve: Weights | None, key: str | None, model: object
) -> list[Anchor]:
    if isinstance(inputs, Curve):
        require(
            curve is None, "inputs is a curve with a control point of its own; leave out curve=."
        )
        return inputs.anchors
    anchors = _anchors(inputs, key, ("last", "mean"), model)
    if len(anchors) < 2:
        raise ArgumentError(f"{counted(anchors)}; a line needs two or more.")
    if curve is None:
        return anchors
    require(len(anchors) == 2, f"A curve goes between two checkpoints; there are {len(anchors)}.")
    return [anchors[0], control_point(curve, anchors, key, model), anchors[1]]


def _refuse_same(anchors: Sequence[Anchor], gram: Floats) -> None:
    for i, (one, other) in enumerate(itertools.pairwise(anchors)):
        if are_same(anchors, gram, i, i + 1):
            raise ArgumentError(
                f"{one.name} and {other.name} are the same weights; there is no line between them. Name "
                "different checkpoints."
            )


def _polyline(size: int) -> Callable[[float], list[float]]:
    def shares(t: float) -> list[float]:
        start = min(max(math.floor(t), 0), size - 2)
        found = [0.0] * size
        found[start], found[start + 1] = 1 - (t - start), t - start
        return found

    return shares


def _positions(segments: int, points: int, beyond: float) -> Floats:
    """Every segment's, the ends that two share once, and as closely spaced beyond both ends."""
    inside = np.concatenate([i + evenly(0, 1, points)[i > 0 :] for i in range(segments)])
    extra = math.ceil(beyond * (points - 1))
    outside = evenly(0, beyond, extra + 1)[1:] if extra else np.empty(0)
    return np.concatenate([-outside[::-1], inside, segments + outside])


def _between(names: Sequence[str], t: float) -> str:
    if t.is_integer() and 0 <= t < len(names):
        return names[int(t)]
    return f"position {t:.4g} of the way through {', '.join(names)}"


def _lengths(positions: Floats, shares: Floats, gram: Floats) -> Floats:
    """Along the path, counted from position 0."""
    steps = np.diff(shares, axis=0)
    lengths = np.sqrt(np.maximum(np.einsum("ni,ij,nj->n", steps, gram, steps), 0))
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    return np.asarray(along - along[int(np.argmin(np.abs(positions)))], dtype=np.float64)


def _means(scores: Sequence[Tensor]) -> Floats:
    return np.array([float(s.mean()) for s in scores])


def _check_number(points: float, names: str) -> None:
    require(
        points <= _MOST_POINTS,
        f"That would be {points:.4g} points, each of which is evaluated; expected at most {_MOST_POINTS:,}. Use a "
        f"smaller {names}.",
    )
