"""BatchNorm statistics of the data under the model's current weights.

Averaged weights never ran on data: the running statistics stored beside them belong to other
weights. `update_bn` measures those of the average, exactly, in one pass over the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "norm_layers": "polyak.batchnorm.layers",
    "trained_layers": "polyak.batchnorm.layers",
    "unsupported_norm_layers": "polyak.batchnorm.layers",
    "update_bn": "polyak.batchnorm.update",
    "update_bn_file": "polyak.batchnorm.update_file",
}

if TYPE_CHECKING:
    from polyak.batchnorm.layers import norm_layers as norm_layers
    from polyak.batchnorm.layers import trained_layers as trained_layers
    from polyak.batchnorm.layers import unsupported_norm_layers as unsupported_norm_layers
    from polyak.batchnorm.update import update_bn as update_bn
    from polyak.batchnorm.update_file import update_bn_file as update_bn_file

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
