"""The drop-in for `torch.optim.swa_utils`: change the import, keep the script.

Every name of torch's module is here, with the same arguments and meaning, and state dicts load both
ways. Where torch is wrong this is right; the page "Differences from torch" lists each case.
"""

from __future__ import annotations

from polyak.swa_utils.averaged_model import AveragedModel
from polyak.swa_utils.functions import (
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from polyak.swa_utils.statistics import update_bn
from polyak.swa_utils.swalr import SWALR

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
