"""polyak averages the weights of neural networks: while they train, afterwards, and across files.

Names are loaded lazily (PEP 562): `import polyak` and `polyak --help` do not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names
from polyak.version import __version__ as __version__

_HOME_OF = {
    "After": "polyak.maths.profiles",
    "Annealed": "polyak.maths.profiles",
    "Average": "polyak.averaging.average",
    "Averages": "polyak.averaging.averages",
    "EMA": "polyak.maths.profiles",
    "LRSchedule": "polyak.averaging.lr_schedule",
    "PolyakError": "polyak.errors",
    "PolynomialEMA": "polyak.maths.profiles",
    "PowerEMA": "polyak.maths.profiles",
    "Profile": "polyak.maths.profile",
    "Recorder": "polyak.averaging.recorder",
    "SWA": "polyak.maths.profiles",
    "SWAG": "polyak.uncertainty.swag",
    "SWAD": "polyak.averaging.scored",
    "Trajectory": "polyak.study.trajectory",
    "TwoTailed": "polyak.averaging.scored",
    "Window": "polyak.maths.profiles",
    "evaluate_averages": "polyak.averaging.evaluate",
    "average_checkpoints": "polyak.checkpoints.merging.average",
    "iter_averaged_tensors": "polyak.checkpoints.merging.average",
    "open_checkpoint": "polyak.checkpoints.reading.opening",
    "plot_schedule": "polyak.report.schedule",
    "predict": "polyak.uncertainty.ensemble",
    "update_bn": "polyak.batchnorm.update",
}

if TYPE_CHECKING:
    from polyak.averaging.average import Average as Average
    from polyak.averaging.averages import Averages as Averages
    from polyak.averaging.evaluate import evaluate_averages as evaluate_averages
    from polyak.averaging.lr_schedule import LRSchedule as LRSchedule
    from polyak.averaging.recorder import Recorder as Recorder
    from polyak.averaging.scored import SWAD as SWAD
    from polyak.averaging.scored import TwoTailed as TwoTailed
    from polyak.batchnorm.update import update_bn as update_bn
    from polyak.checkpoints.merging.average import average_checkpoints as average_checkpoints
    from polyak.checkpoints.merging.average import iter_averaged_tensors as iter_averaged_tensors
    from polyak.checkpoints.reading.opening import open_checkpoint as open_checkpoint
    from polyak.errors import PolyakError as PolyakError
    from polyak.maths.profile import Profile as Profile
    from polyak.maths.profiles import EMA as EMA
    from polyak.maths.profiles import SWA as SWA
    from polyak.maths.profiles import After as After
    from polyak.maths.profiles import Annealed as Annealed
    from polyak.maths.profiles import PolynomialEMA as PolynomialEMA
    from polyak.maths.profiles import PowerEMA as PowerEMA
    from polyak.maths.profiles import Window as Window
    from polyak.report.schedule import plot_schedule as plot_schedule
    from polyak.study.trajectory import Trajectory as Trajectory
    from polyak.uncertainty.ensemble import predict as predict
    from polyak.uncertainty.swag import SWAG as SWAG

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
