"""The processes that share a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from polyak.checkpoints.writing.ranks import Ranks as WritingRanks
from polyak.errors import ArgumentError, UsageError
from polyak.tensors.sharding import is_sharded, part_of, sharded_as

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Each of `count` processes trains on its share of every batch; the first writes the run.

    With the strategy `ddp` each holds the whole model (DistributedDataParallel), with `fsdp` a shard of
    it (FSDP2). All hold all data, evaluate all of it and come to the same decisions.
    """

    index: int = 0
    count: int = 1
    strategy: str = "ddp"

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of each weight."""
        return self.strategy == "fsdp"

    def share(self, values: Tensor) -> Tensor:
        """Every `count`-th of the values, which all processes have alike."""
        return values[self.index :: self.count]

    def trained(self, model: nn.Module) -> nn.Module:
        """What the training pass calls: the gradients are then the mean over the processes."""
        if self.is_sharded:
            from torch.distributed.fsdp import fully_shard

            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # FSDP2 asks for it
            return cast("nn.Module", fully_shard(model))
        return DistributedDataParallel(model) if self.count > 1 else model

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def first(self, work: Callable[[], Result]) -> Result:
        """Do something in the first process alone; all get its result, or raise its error."""
        if self.count == 1:
            return work()
        all_ranks = WritingRanks()
        result = all_ranks.together(lambda: work() if self.index == 0 else None)
        return cast("Result", all_ranks.gather(result)[0])

    def environment(self) -> dict[str, str]:
        """What must be equal for a resumed run to end in the same bits."""
        return {"processes": f"{self.count} ({self.strategy})" if self.count > 1 else "1"}


def whole(state: Any) -> Any:
    """A state with every sharded tensor gathered; all processes must call it."""
    return tree_map_only(Tensor, lambda t: t.full_tensor() if is_sharded(t) else t, state)


def sharded_like(state: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors cut as those of the same name are cut in `like`."""
    return {name: _cut(value, like.get(name)) for name, value in state.items()}


def shard_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Cut an optimizer's state, loaded as whole tensors, as its parameters are cut."""
    for parameter, state in optimizer.state.items():
        state.update({key: _cut(value, parameter) for key, value in state.items()})


def _cut(value: Any, like: Any) -> Any:
    if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return sharded_as(part_of(value, like), like)


def is_launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    return distributed.is_torchelastic_launched() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextmanager
def joined(strategy: str, device: torch.device) -> Iterator[Ranks]:
    """The processes of this run, connected for the block unless they are already.

    Raises ArgumentError for `fsdp` in a process that no launcher started, UsageError if the processes
    do not find each other.
    """
    own = not distributed.is_initialized()
    if own and not is_launched():
        if strategy == "fsdp":
            raise ArgumentError(
                "strategy is 'fsdp', and this is one process alone. Start the run with torchrun "
                "--nproc-per-node N -m polyak train, or leave strategy at ddp."
            )
        yield Ranks()
        return
    if own:
        _connect(device)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), strategy)
    finally:
        if own:
            distributed.destroy_process_group()


def _connect(device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"The processes of this run did not find each other: {error}. Start them with torchrun "
            "--nproc-per-node N -m polyak train."
        ) from error
