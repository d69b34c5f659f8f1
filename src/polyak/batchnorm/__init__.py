"""Normalisation statistics of the data under the present weights.

Averaged weights never ran on data: the running statistics stored beside them belong to other
weights. `update_bn` measures those of the average, exactly, in one pass over the data.
"""

from __future__ import annotations

from polyak.batchnorm.layers import norm_layers, trained_layers, unmeasured_layers
from polyak.batchnorm.update import update_bn

__all__ = ["norm_layers", "trained_layers", "unmeasured_layers", "update_bn"]
