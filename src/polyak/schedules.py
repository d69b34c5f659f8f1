"""Learning-rate schedules: `from polyak import schedules`, then `schedules.Linear(0.1, 0.01)`."""

from polyak.maths.schedules import (
    Chain,
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    PerEpoch,
    Sawtooth,
    Schedule,
    Triangular,
    Warmup,
    chain,
)

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
