"""An average goes on from a file: its own state, or another library's."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from polyak.averaging.interop import import_state
from polyak.errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from polyak.averaging.average import Average


def load(average: Average, path: str | os.PathLike[str], *, updates: int | None = None) -> None:
    """Go on from a file; what `Average.load` says."""
    state = _read(Path(path))
    is_own = isinstance(state, dict) and state.keys() >= {"version", "profile", "tensors"}
    if not is_own:
        import_state(average, state, updates=updates)
    elif updates is None:
        average.load_state_dict(state)
    else:
        raise ArgumentError(
            f"{path} is a state of polyak's, which says how many updates it stands for: leave out updates="
        )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"{path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise FormatError(
            f"{path} cannot be read as a state. It may be cut short, or hold more than tensors and"
            " plain values: then load it as it was saved, and give load_state_dict() (a state of"
            f" polyak's) or import_state() (another's) the part that is the state. ({type(error).__name__}: {str(error)[:200]})"
        ) from error
