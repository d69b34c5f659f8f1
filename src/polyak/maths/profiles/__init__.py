r"""Profiles: how much each moment of training counts in an average.

A profile is one function, the cumulative share $F(x, t)$: the share of the average, seen from now
$= t$, that comes from the time up to $x$, $0 \le x \le t$. Both are counted from the start of
averaging in any unit that only grows (steps, captures, samples, tokens). All else follows from it:

- an interval $(a, b]$ holds $F(b, t) - F(a, t)$ (`interval_mass`);
- when time moves from $t - dt$ to $t$ the newest weights enter with $1 - F(t - dt, t)$ (`share`),
  and ``average += share * (weights - average)`` is exact for every *streaming* profile: one in
  which $F(x, t) / F(y, t)$ does not depend on $t$;
- weights taken at $t_1 < t_2 < \dots$ stand for $(t_{i-1}, t_i]$, the first for all before it
  (`weights`), which gives the effective number of samples; `mean_age` and `half_life` likewise.

Every formula is written in operators that floats, NumPy arrays and 0-d tensors share, so that the
share can be computed on a device from a time that lives there.
"""

from polyak.maths.profiles.base import Profile
from polyak.maths.profiles.later import After
from polyak.maths.profiles.stored import Annealed, Window
from polyak.maths.profiles.streaming import EMA, RELATIVE_STD_LIMIT, SWA, PowerEMA

__all__ = [
    "EMA",
    "RELATIVE_STD_LIMIT",
    "SWA",
    "After",
    "Annealed",
    "PowerEMA",
    "Profile",
    "Window",
]
