"""FSDP2: parameters that are gathered for a forward pass, and brought back to their shards.

While parameters are gathered, modules hold plain copies in place of the shards: what is read then is
stale after the next step, and what is written to the shards has no effect on the next forward pass. By
default a root keeps its parameters gathered after a forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.nn import Module


def reshard(model: Module) -> None:
    """Bring every gathered parameter of the model back to its shard; no communication.

    `FSDPModule.reshard` does so for one module, and not after a forward pass that raised.
    """
    for group in _groups(model):
        if group._all_gather_result is not None:  # gathered ahead, by `unshard(async_op=True)`
            group.wait_for_unshard()
        group.reshard()
        if not group.is_sharded:
            group._to_sharded()


def tensor_parallel_meshes(model: Module) -> list[Any]:
    """The meshes over which tensor parallelism shards the model: their ranks see the same data."""
    meshes: dict[Any, None] = {}
    managed: set[tuple[int, str]] = set()
    for group in _groups(model):
        for parameter in group.fsdp_params:
            managed |= set(_places(parameter))
            if parameter.is_dtensor and not parameter.mesh_info.is_spmd_mesh:
                meshes[parameter._unsharded_dtensor_spec.mesh] = None
    for module in model.modules():
        for name, tensor in module._parameters.items():
            mesh = getattr(tensor, "device_mesh", None)
            if mesh is not None and (id(module), name) not in managed:
                meshes[mesh] = None
    return list(meshes)


def _groups(model: Module) -> Iterator[Any]:
    """The groups of parameters that are gathered together, by modules of the model or above it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nothing has been sharded
    if fsdp is None:
        return
    from torch.distributed._composable_state import _module_state_mapping

    states = {
        module._get_fsdp_state(): None
        for module in list(_module_state_mapping)
        if isinstance(module, fsdp.FSDPModule)
    }
    own = set(map(id, model.modules())) if states else set()  # loans of plain models wait for this
    for state in states:
        for group in state._fsdp_param_groups:
            if any(place in own for p in group.fsdp_params for place, _ in _places(p)):
                yield group


def _places(parameter: Any) -> Iterator[tuple[int, str]]:
    """Which modules hold it, by id, under which name."""
    info = parameter._module_info
    yield id(info.module), info.param_name
    yield from zip(map(id, info.shared_modules), info.shared_param_names, strict=True)
