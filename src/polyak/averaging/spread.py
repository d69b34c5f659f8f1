"""The spread of the weights around their average: what SWAG keeps, and how it draws from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.accumulators import (
    Accumulator,
    Options,
    RunningAverage,
    copy_by_name,
    megabytes,
)
from polyak.averaging.clock import Clock
from polyak.errors import ArgumentError
from polyak.tensors.blend import blank_like
from polyak.tensors.sharding import is_sharded, refuse_flat_modules


class SpreadAverage(RunningAverage):
    r"""A running average, the variance around it, and the last deviations from it.

    With $D = w - \bar w$, where $\bar w$ includes $w$ already, and $s$ the share of $w$ in it,

    $$v \leftarrow (1 - s) \, v + \frac{s}{1 - s} D^2,$$

    which for equal shares is Welford's population variance. It is never negative, and no digits cancel
    as in $E[w^2] - E[w]^2$. Complex values are pairs of real ones, in the variance too.
    """

    def __init__(self, live: Sequence[Tensor], options: Options) -> None:
        super().__init__(live, options)
        self._live = live
        self.variance = blank_like(live, options.dtype, options.device)
        self.columns: list[list[Tensor]] = []  # the deviations, oldest first

    @classmethod
    def check_model(cls, model: Module) -> None:
        """Refuse sharded models: ranks would have to draw the same numbers for what each has a copy of."""
        refuse_flat_modules(model)
        # FSDP2 shows plain parameters between a forward pass and the next step; the module knows better.
        kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
        found = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
        if found or "FSDPModule" in kinds:
            raise ArgumentError(
                f"SWAG is not available on sharded models ({found or type(model).__name__} is sharded). Keep "
                "the mean with polyak.Average, or record the run with polyak.Recorder and make the SWAG "
                "of an unsharded model afterwards: polyak.SWAG.from_trajectory."
            )

    def settle(self, now: Clock) -> None:
        """The average has moved: take the deviation from it."""
        super().settle(now)
        now = now.on_host()
        share = float(now.share)
        if share == 0:
            return
        if share == 1:  # the first weights, or the first after a restart
            self.columns = []
            torch._foreach_zero_(self.variance)
        column = self._next_column()
        for index, live in enumerate(self._live):
            mean = self.value(index, now)
            deviation = live.detach().to(mean.dtype) - mean
            if share < 1:
                one = _real(deviation)
                _real(self.variance[index]).mul_(1 - share).addcmul_(
                    one, one, value=share / (1 - share)
                )
            if column:
                column[index].copy_(deviation)

    def regroup(self, live: Sequence[Tensor], grouped: Any) -> None:
        """Take the deviations of these from now on."""
        super().regroup(live, grouped)
        self._live = live

    def add(self, values: Sequence[Tensor], now: Clock) -> None:
        """More tensors, which have been constant so far: nothing has deviated."""
        super().add(values, now)
        self.variance += blank_like(values, self._options.dtype, self._options.device)
        for column in self.columns:
            column.extend(self._column_like(values))

    def drawn(self, now: Clock, generator: torch.Generator | None, scale: float) -> list[Tensor]:
        """One set of weights from the Gaussian, in the precision of the average.

        The factors of the deviations are one for the whole of the weights, and are drawn first.
        """
        now = now.on_host()
        n_columns = len(self.columns)
        spread, factors = math.sqrt(scale), [0.0] * n_columns
        if n_columns:
            each = math.sqrt(scale / (2 * (n_columns - 1)))
            factors = (_normal((n_columns,), torch.float64, None, generator) * each).tolist()
            spread = math.sqrt(scale / 2)
        return [self._drawn(i, now, factors, spread, generator) for i in range(len(self.tensors))]

    def tensors_held(self) -> list[list[Tensor]]:
        """The average, the variance, and the deviations."""
        return [*super().tensors_held(), self.variance, *self.columns]

    def tensors_to_check(self) -> list[list[Tensor]]:
        """The same, without copies of what is packed, as a rule."""
        return [*super().tensors_to_check(), self.variance, *self.columns]

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """What the average keeps, and the spread by the same names."""
        columns = tuple(dict(zip(names, column, strict=True)) for column in self.columns)
        variance = dict(zip(names, self.variance, strict=True))
        own = {"rank": self._options.rank, "variance": variance, "deviations": columns}
        return super().state(names) | own

    def load_state(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        super().load_state(state, names)
        copy_by_name(self.variance, state["variance"], names)
        self.columns = []
        for deviations in state["deviations"]:
            self.columns.append(self._column_like(self._live))
            copy_by_name(self.columns[-1], deviations, names)

    @classmethod
    def check_state(cls, state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        """The same, the variance, and the deviations."""
        columns = enumerate(state["deviations"])
        groups = super().check_state(state) | {"variance": state["variance"]}
        return groups | {f"deviations[{i}]": dict(column) for i, column in columns}

    @classmethod
    def tensors_per_weight(cls, options: Options) -> int:
        """The mean, the variance and the deviations."""
        return 2 + options.rank

    @classmethod
    def describe(cls, nbytes: int, options: Options, held: Accumulator | None) -> list[str]:
        """Two copies of the weights, and one for each deviation."""
        where = "" if options.deviations_device is None else f" on {options.deviations_device}"
        n_columns = len(held.columns) if isinstance(held, cls) else 0
        mean, *rest = super().describe(nbytes, options, held)
        return [
            f"keeps {megabytes((2 + options.rank) * nbytes)}: mean and variance "
            f"{megabytes(2 * nbytes)}, {options.rank} deviations "
            f"{megabytes(options.rank * nbytes)}{where}, {n_columns} of them held now",
            f"the mean {mean}",
            *rest,
        ]

    def _next_column(self) -> list[Tensor]:
        rank = self._options.rank
        if rank == 0:
            return []
        full = len(self.columns) == rank
        self.columns.append(self.columns.pop(0) if full else self._column_like(self._live))
        return self.columns[-1]

    def _column_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        options = self._options
        return blank_like(tensors, options.dtype, options.deviations_device or options.device)

    def _drawn(
        self,
        index: int,
        now: Clock,
        factors: Sequence[float],
        spread: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        result = self.value(index, now).clone()
        real, variance = _real(result), _real(self.variance[index])
        noise = _normal(real.shape, real.dtype, real.device, generator)
        real.addcmul_(variance.sqrt(), noise, value=spread)
        if self.columns:
            low_rank = torch.zeros_like(self.columns[0][index])
            for factor, column in zip(factors, self.columns, strict=True):
                low_rank.add_(column[index], alpha=factor)
            result += low_rank.to(result.device)
        return result


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _normal(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Random numbers, drawn where the generator is, so that they are the same on any device."""
    where = device if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, dtype=dtype, device=where)
    return drawn if generator is None else drawn.to(device or where)
