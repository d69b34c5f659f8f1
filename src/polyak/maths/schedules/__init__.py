r"""Learning rates as plain functions of time, which know when weights are to be averaged.

A schedule is a frozen dataclass, called with a step counted from 0: the rate that this step uses.
Schedules are joined by wrapping (`chain`, `Warmup`, `per_epoch`) and never change anything.

The cyclic ones know their lowest point, and those are the moments to average: `averaging_points`
counts *completed* steps, so weights taken after 100 are those that steps 0 to 99 have made.

>>> schedule = chain(
...     (50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (40, CyclicLinear(high=0.05, low=0.01, cycle=10))
... )
>>> schedule(0), round(schedule(113), 12)
(0.1, 0.034)
>>> schedule.averaging_points()
(100, 110, 120, 130, 140)
"""

from polyak.maths.schedules.base import PerEpoch, Schedule
from polyak.maths.schedules.curves import Constant, Cosine, Linear
from polyak.maths.schedules.cycles import CyclicLinear, Sawtooth, Triangular
from polyak.maths.schedules.joined import Chain, Warmup, chain

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "CyclicLinear",
    "Linear",
    "PerEpoch",
    "Sawtooth",
    "Schedule",
    "Triangular",
    "Warmup",
    "chain",
]
