"""Which tensors of a state dict are the vectors that spectral norm estimates a norm with."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

_PARAMETRIZED = re.compile(r"(?:.*\.)?parametrizations\.[^.]+\.\d+\._[uv]")


def is_spectral_vector(name: str, names: Container[str], shape: Sequence[int]) -> bool:
    """Whether `name`, one of `names`, is a vector of torch's spectral norm, old style or new.

    They are unit vectors: a mean of several is shorter, and the layer's norm too large by as much.
    """
    base, _, last = name.rpartition("_")
    if last not in ("u", "v") or len(shape) != 1:
        return False
    return f"{base}_orig" in names or _PARAMETRIZED.fullmatch(name) is not None
