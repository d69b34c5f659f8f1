"""Models whose weights are spread over several processes: recognised by what they are, and refused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from polyak.errors import ArgumentError

# Classes of torch (FSDP1, FSDP2), fairscale and torch_xla, by the names that they share.
_SHARDING = {"FullyShardedDataParallel", "FSDPModule", "XlaFullyShardedDataParallel"}
# What FSDP1 and DeepSpeed ZeRO-3 put on the parameters that they partition, whole or not.
_MARKS = {"_fsdp_flattened": "FSDP", "ds_id": "DeepSpeed ZeRO-3"}
_ADVICE = (
    "Averages of sharded models are not supported yet. Average the model before it is sharded, or the "
    "checkpoints that it writes: polyak.average_checkpoints, or `polyak average`."
)


def refuse_sharded_modules(model: Module) -> None:
    """Raise ArgumentError if any module is sharded, whatever its parameters are at this moment."""
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__} & _SHARDING
        if kinds:
            what = name or "the model"
            raise ArgumentError(f"{what} is sharded (a {kinds.pop()}). {_ADVICE}")


def refuse_sharded_tensor(name: str, tensor: Tensor) -> None:
    """Raise ArgumentError for a DTensor, or a parameter of which each process keeps a part."""
    for mark, framework in _MARKS.items():
        if hasattr(tensor, mark):
            raise ArgumentError(f"{name} is sharded (a parameter of {framework}). {_ADVICE}")
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise ArgumentError(f"{name} is sharded (a DTensor). {_ADVICE}")
