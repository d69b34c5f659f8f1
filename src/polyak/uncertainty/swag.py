"""`SWAG`: a Gaussian around the average of a model's weights, to draw models from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import Module

from polyak.averaging.accumulators import Options, RunningAverage
from polyak.averaging.average import Average
from polyak.averaging.spread import SpreadAverage
from polyak.averaging.tracker import Member, Tracker
from polyak.averaging.values import Loan, swapped_in
from polyak.batchnorm.batches import Forward
from polyak.batchnorm.update import update_bn as measure_statistics
from polyak.batchnorm.update import warn_unsupported
from polyak.errors import (
    ArgumentError,
    FormatError,
    MismatchError,
    StaleStatistics,
    UsageError,
    require,
    warn,
)
from polyak.maths.arguments import count, number
from polyak.maths.profiles import SWA
from polyak.study.trajectory import Trajectory
from polyak.tensors.finite import refuse_nonfinite
from polyak.uncertainty import swag_files
from polyak.uncertainty.prediction import GaussianPrediction, Outputs, Prediction

_STALE = (
    "This model has BatchNorm layers, and the draws of this SWAG were used with statistics of other "
    "weights, which can cost more than SWAG gains. Pass update_bn=batches of training data, and they are "
    "measured for every draw."
)


class SWAG(Average):
    r"""A Gaussian around the average of a model's weights, kept while it trains, to draw models from.

    It is an `Average` with the profile `SWA()`, and all of that works: `update`, `attach`, `applied`,
    `update_bn`, `copy_to`, `state_dict`, `plan`. Beside the mean $\bar w$ it keeps the variance $v$ of
    each weight, and the last `rank` deviations $D_i = w_i - \bar w_i$, where $\bar w_i$ includes
    $w_i$ already. A draw is

    $$\tilde w = \bar w + \sqrt{scale} \left( \sqrt{v / 2} \; z_1
    + \frac{1}{\sqrt{2 (K - 1)}} \sum_{i=1}^K D_i \, z_{2,i} \right),
    \qquad z_1 \sim N(0, I), \; z_2 \sim N(0, I_K),$$

    with $K \le rank$ the deviations held, and one $z_2$ for all tensors. `scale=1.0` is the paper's SWAG
    (0.5 in the authors' code). With `rank=0` the Gaussian is diagonal, and a draw is
    $\bar w + \sqrt{scale \, v} \; z_1$.

    Attach it where averaging is to begin, with a learning rate that keeps the weights moving. It takes
    `rank + 2` times the weights, in float32: `print(swag.plan())`.

    Args:
        model: the model that trains. It is never copied; tensors are matched by name.
        rank: how many deviations to keep; 0 for a diagonal Gaussian.
        device: where to keep the deviations, the largest part: "cpu" beside a GPU takes no memory there.
        unit: as for `Average`, and so are `include`, `exclude`, `dtype` and `nonfinite`. What is not
            averaged is not drawn: it is the model's own in every draw.
        include: see `unit`.
        exclude: see `unit`.
        dtype: see `unit`.
        nonfinite: see `unit`.

    Raises:
        ArgumentError: options out of their domain, a sharded model.

    Source: Maddox et al. 2019, arXiv 1902.02476.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> swag = polyak.SWAG(model, rank=2)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     swag.update()
    >>> with swag.sample(generator=torch.Generator().manual_seed(0)):
    ...     drawn = model.weight.item()
    >>> round(drawn, 2), model.weight.item()
    (-0.41, 6.0)

    """

    def __init__(  # noqa: PLR0913 - each one fact, keyword-only
        self,
        model: Module,
        rank: int = 20,
        *,
        device: torch.device | str | None = None,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
    ) -> None:
        count("rank", rank)
        require(rank != 1, "rank is 1; expected 0 (a diagonal Gaussian), or 2 deviations or more.")
        self._tracker = Tracker(
            model,
            unit=unit,
            include=include,
            exclude=exclude,
            dtype=dtype,
            nonfinite=nonfinite,
            rank=rank,
            deviations_device=device,
        )
        SpreadAverage.check_model(model)
        self._member = self._tracker.join(SWA(), SpreadAverage)
        self._name = None
        self._warned: set[str] = set()

    @classmethod
    def from_trajectory(
        cls,
        model: Module,
        trajectory: Trajectory,
        *,
        since: float | None = None,
        until: float | None = None,
        rank: int = 20,
        **options: Any,
    ) -> SWAG:
        """The SWAG of the weights that a record holds, or of the checkpoints of a run, afterwards.

        Each interval's mean counts as one capture, for as long as the interval is. Means move less than
        single weights: in our runs this SWAG had two thirds of the gain in likelihood of one that was kept
        while the model trained, with nothing recorded but the means.

        Args:
            model: a model of the kind that was recorded; it is not changed.
            trajectory: `polyak.Trajectory(folder)`, or `Trajectory.from_checkpoints(files)`.
            since: use what begins at this time or later, in the trajectory's unit: where the averaging
                phase begins.
            until: use what ends at this time or before.
            rank: as for `SWAG`, and so are the other options.
            options: see `rank`.

        Raises:
            ArgumentError: fewer than two intervals between `since` and `until`.
            MismatchError: a file that does not fit the model; every tensor is named.

        """
        if not isinstance(trajectory, Trajectory):
            raise ArgumentError(
                f"trajectory is a {type(trajectory).__name__}; expected polyak.Trajectory(folder), or "
                "polyak.Trajectory.from_checkpoints(files)."
            )
        swag = cls(model, rank, **{"unit": trajectory.unit, **options})
        swag.load_state_dict(swag_files.state_of(swag._member, trajectory, since, until))
        return swag

    @property
    def rank(self) -> int:
        """How many deviations are kept at most; 0 for a diagonal Gaussian."""
        return self._tracker.options.rank

    @property
    def columns(self) -> int:
        """How many deviations are held."""
        self._tracker.ready_to_read()
        held = self._member.accumulator
        return len(held.columns) if isinstance(held, SpreadAverage) else 0

    @contextmanager
    def sample(
        self,
        *,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        update_bn: Iterable[Any] | None = None,
        limit: int | None = None,
        forward: Forward | None = None,
        in_place: bool = False,
    ) -> Iterator[Module]:
        """Swap one draw into the model for the block, then restore the model's own weights.

        The rules in the block are those of `applied`. Draws are made with `generator`, on its device, and
        with torch's own otherwise; equal generators give equal draws.

        Args:
            scale: of the covariance; 0 gives the mean.
            generator: a `torch.Generator` for reproducible draws.
            update_bn: batches of training data, on which the BatchNorm statistics of this draw are
                measured first. Without them a model with BatchNorm layers is run with statistics that
                are not the draw's, which one StaleStatistics warning says.
            limit: use at most this many of these batches.
            forward: how to run the model on one, as for `polyak.update_bn`.
            in_place: exchange contents instead of pointers, as for `applied`.

        Raises:
            UsageError: fewer than two captures; inside another block of this kind.
            ArgumentError: a scale that is negative.
            NonFiniteError: a NaN or an infinity in what was captured.

        """
        drawn = self._drawn(scale, generator)
        lent = swapped_in(drawn, owner=self, in_place=in_place)
        with Loan(lent, partial(self._warn_of_statistics, drawn)):
            if update_bn is not None:
                warn_unsupported(self.model)
                layers = self._tracker.layers_to_refresh()
                measure_statistics(
                    self.model, update_bn, forward=forward, limit=limit, layers=layers
                )
            yield self.model

    def predict(  # noqa: PLR0913 - keyword-only
        self,
        batches: Iterable[Any],
        *,
        draws: int = 30,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        update_bn: Iterable[Any] | None = None,
        limit: int | None = None,
        forward: Forward | None = None,
        outputs: Outputs = "logits",
    ) -> Prediction | GaussianPrediction:
        """The prediction of the Gaussian: that of `polyak.predict(self, batches, ...)`, see there."""
        from polyak.uncertainty.ensemble import predict  # which draws from SWAGs

        return predict(
            self,
            batches,
            draws=draws,
            scale=scale,
            generator=generator,
            update_bn=update_bn,
            limit=limit,
            forward=forward,
            outputs=outputs,
        )

    def save(  # type: ignore[override]
        self, path: str | os.PathLike[str], *, overwrite: bool = False
    ) -> None:
        """Write mean, variance and deviations to a `.safetensors` file that any reader opens.

        The mean has the model's own names, in the precision of the accumulators, beside everything else
        that the model holds; `swag.variance.<name>` is the variance of each weight, and
        `swag.deviations.<k>.<name>` the k-th deviation held, from 0, the oldest. `load` reads it.

        Raises OutputError, NonFiniteError, UsageError and ArgumentError as `Average.save` does.
        """
        swag_files.save(self._member, path, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str], *, updates: int | None = None) -> None:
        """Continue from a file: what `save` wrote, or a saved `state_dict()`.

        Raises ArgumentError if there is no such file, or for `updates`, which a mean alone would need;
        FormatError if it is another kind of file; MismatchError if it belongs to a different SWAG. Nothing
        is changed then.
        """
        if updates is not None:
            self._refuse_means()
        self._tracker.refuse_during_loan("load()")
        with self._tracker.tensors.bound_temporarily():
            self.load_state_dict(swag_files.read(self._member, path))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; see `Average.load_state_dict`.

        Raises FormatError for the state of a plain Average, which has no spread, and MismatchError for one of
        another rank; nothing is changed then.
        """
        found: Any = state_dict  # it may be anything, which the check of all states says
        if isinstance(found, Mapping) and "profile" in found:
            if "variance" not in found:
                raise FormatError(
                    "This is the state of an average without variance and deviations. Nothing was loaded: "
                    "load it into a polyak.Average, or give the state_dict() of a SWAG."
                )
            if (rank := found.get("rank")) != self.rank:
                raise MismatchError(
                    f"This is the state of a SWAG of rank {rank}, and this one has rank {self.rank}. Nothing "
                    f"was loaded: make it with rank={rank}."
                )
        super().load_state_dict(state_dict)

    def import_state(self, state_dict: Mapping[str, Any], *, updates: int | None = None) -> None:
        """Not available: other libraries' averages are means. Raises ArgumentError."""
        self._refuse_means()

    def __repr__(self) -> str:
        return (
            f"SWAG({type(self.model).__name__}, rank={self.rank}, time={self.time:g} "
            f"{self.unit or 'updates'}, count={self.count})"
        )

    def _refuse_means(self) -> None:
        raise ArgumentError(
            "A mean of weights has no spread to draw from. Make the SWAG of a run's checkpoints instead: "
            "polyak.SWAG.from_trajectory(model, polyak.Trajectory.from_checkpoints(files))."
        )

    def _drawn(self, scale: float, generator: torch.Generator | None) -> Member:
        """A draw, as if it were an average of these weights."""
        number("scale", scale)
        require(
            0 <= scale < math.inf,
            f"scale is {scale}; expected a finite number from 0 on: it is a factor of the covariance.",
        )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentError(
                f"generator is a {type(generator).__name__}; expected torch.Generator().manual_seed(...)."
            )
        self._tracker.refuse_during_loan("sample()")
        self._tracker.ready_to_read()
        held = self._checked()
        member = self._member
        draw = RunningAverage((), Options(dtype=self._tracker.options.dtype))
        with torch.no_grad(), torch.inference_mode(False):
            draw.tensors = held.drawn(member.clock, generator, scale)
            statistics = [one.clone() for one in member.statistics]
        refuse_nonfinite(
            [*zip(self._tracker.tensors.names, draw.tensors, strict=True)],
            "sample()",
            "One bad capture spoils a SWAG for good: load an earlier state, and construct it with "
            "nonfinite='skip' or 'raise' to keep such weights out.",
            self._tracker.tensors.ranks,
        )
        return Member(
            self._tracker,
            member.clock,
            RunningAverage,
            member.unit,
            accumulator=draw,
            own_statistics=statistics,
        )

    def _checked(self) -> SpreadAverage:
        """What was captured, if it is enough; a warning if it is less than was asked for."""
        held, captures = self._member.accumulator, self.count
        if not isinstance(held, SpreadAverage) or captures < 2:
            raise UsageError(
                f"{self!r} has nothing to draw from: {captures} capture{'' if captures == 1 else 's'}, and a spread needs at least "
                f"2.{self._unused()}"
            )
        n_columns = len(held.columns)
        if n_columns < self.rank and "columns" not in self._warned:
            self._warned.add("columns")
            warn(
                f"This SWAG asks for rank {self.rank} and has captured weights {n_columns} times: draws use the "
                f"{n_columns} deviations held. Capture more often, or pass rank={n_columns}."
            )
        return held

    def _warn_of_statistics(self, drawn: Member) -> None:
        if "statistics" not in self._warned and drawn.stale_layers():
            self._warned.add("statistics")
            warn(_STALE, StaleStatistics)
