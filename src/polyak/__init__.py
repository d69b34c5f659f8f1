"""polyak averages the weights of neural networks: while they train, afterwards, and across files.

Names are handed on lazily (PEP 562): `import polyak` and `polyak --help` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "Average": "polyak.averaging.average",
    "Averages": "polyak.averaging.average",
    "After": "polyak.maths.profiles",
    "Annealed": "polyak.maths.profiles",
    "EMA": "polyak.maths.profiles",
    "PowerEMA": "polyak.maths.profiles",
    "SWA": "polyak.maths.profiles",
    "Window": "polyak.maths.profiles",
    "PolyakError": "polyak.errors",
    "Constant": "polyak.maths.schedules",
    "Cosine": "polyak.maths.schedules",
    "CyclicLinear": "polyak.maths.schedules",
    "LRSchedule": "polyak.averaging.lr_schedule",
    "Linear": "polyak.maths.schedules",
    "Sawtooth": "polyak.maths.schedules",
    "Triangular": "polyak.maths.schedules",
    "Warmup": "polyak.maths.schedules",
    "average_checkpoints": "polyak.checkpoints.merging.average",
    "averaged_tensors": "polyak.checkpoints.merging.average",
    "chain": "polyak.maths.schedules",
    "plot_schedule": "polyak.report.schedule",
    "update_bn": "polyak.batchnorm",
}

if TYPE_CHECKING:
    from polyak.averaging.average import Average as Average
    from polyak.averaging.average import Averages as Averages
    from polyak.averaging.lr_schedule import LRSchedule as LRSchedule
    from polyak.batchnorm import update_bn as update_bn
    from polyak.checkpoints.merging.average import average_checkpoints as average_checkpoints
    from polyak.checkpoints.merging.average import averaged_tensors as averaged_tensors
    from polyak.errors import PolyakError as PolyakError
    from polyak.maths.profiles import EMA as EMA
    from polyak.maths.profiles import SWA as SWA
    from polyak.maths.profiles import After as After
    from polyak.maths.profiles import Annealed as Annealed
    from polyak.maths.profiles import PowerEMA as PowerEMA
    from polyak.maths.profiles import Window as Window
    from polyak.maths.schedules import Constant as Constant
    from polyak.maths.schedules import Cosine as Cosine
    from polyak.maths.schedules import CyclicLinear as CyclicLinear
    from polyak.maths.schedules import Linear as Linear
    from polyak.maths.schedules import Sawtooth as Sawtooth
    from polyak.maths.schedules import Triangular as Triangular
    from polyak.maths.schedules import Warmup as Warmup
    from polyak.maths.schedules import chain as chain
    from polyak.report.schedule import plot_schedule as plot_schedule

__all__ = sorted([*_HOME_OF, "__version__"])  # noqa: PLE0605 - built from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'polyak' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
