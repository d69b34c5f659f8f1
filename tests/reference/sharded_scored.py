"""SWAD and two-tailed averaging on a sharded model: bitwise those of the same model whole, and one answer on all ranks."""

from __future__ import annotations

import io

import torch
import torch.distributed as dist
from reference.sharded_runs import flat_mesh, full, make, shard, step
from torch.distributed.fsdp import FSDPModule, fully_shard

import polyak

LOSSES = (3, 2, 1, 1.1, 1.2, 1.9, 2.0)
X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))


def part_of(averager):
    """What this rank's part of the data adds to a score: nothing over all ranks, and nothing to a whole model's."""
    if not isinstance(averager.average.model, FSDPModule):
        return 0.0
    return 0.9 if dist.get_rank() % 2 else -0.9


def shard_root(model):
    """Nothing but the root is wrapped: a forward pass without a backward one leaves no parameter sharded."""
    fully_shard(model, mesh=flat_mesh())
    return model


def trained(kind, tell, rounds, sharded=shard, **options):
    """The averager of a sharded model and of a whole one, trained alike and told by `tell`."""
    made = []
    for model in (sharded(make()), make()):
        averager = kind(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        averager.attach(optimizer)
        for number in range(rounds):
            step(model, optimizer, X)
            step(model, optimizer, X)
            with torch.no_grad():  # validation, before the loss is told
                model(X)
            tell(averager, number)
        made.append(averager)
    return made


def averaged(averager):
    with averager.average.applied() as model:
        return {name: full(tensor).clone() for name, tensor in model.state_dict().items()}


def check_equal(one, other):
    for name, tensor in averaged(one).items():
        torch.testing.assert_close(tensor, averaged(other)[name], rtol=0, atol=0)


def check_swad(folder):
    def tell(swad, number):
        swad.score(LOSSES[number] + part_of(swad))

    for how in (shard, shard_root):
        sharded, whole = trained(polyak.SWAD, tell, len(LOSSES), how, n_start=2, n_end=2)
        assert sharded.window == whole.window == (2, 4)
        check_equal(sharded, whole)
        resumed(sharded, polyak.SWAD(sharded.average.model, n_start=2, n_end=2))


def check_two_tailed(folder):
    for how in (shard, shard_root):
        two_tailed(how)


def two_tailed(how):
    took = []

    def tell(tails, number):
        if number % 2:
            took.append(tails.score(lambda model: model(X).square().mean()))
        else:
            took.append(tails.choose(1.0 + part_of(tails), 0.9))

    sharded, whole = trained(polyak.TwoTailed, tell, 5, how)
    assert took == [False, True, False, True, False] * 2
    check_equal(sharded, whole)
    resumed(sharded, polyak.TwoTailed(sharded.average.model))


def resumed(averager, again):
    """From what a rank saves of itself."""
    saved = io.BytesIO()
    torch.save(averager.state_dict(), saved)
    saved.seek(0)
    again.load_state_dict(torch.load(saved, weights_only=False))
    check_equal(averager, again)


CHECKS = {"swad": check_swad, "two_tailed": check_two_tailed}
