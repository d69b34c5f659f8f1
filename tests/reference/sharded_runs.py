"""Checks of sharded averages on real processes: each by name, all in one launch per number of ranks."""

import json
import shutil
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference.ranks import run_checks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import polyak
import polyak.sharded
from polyak.averaging import packing
from polyak.checkpoints.writing import collective
from polyak.errors import ArgumentError, MismatchError, NonFiniteError, PolyakError, UsageError
from polyak.tensors.sharding import boxes, local, narrowed

EMA = polyak.EMA(decay=0.9)


class Uneven(nn.Module):
    """Dimensions that no number of ranks divides, a scalar, a tie, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(7, 9)
        self.block = nn.Sequential(nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 9))
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(9, 1)
        self.frozen = nn.Parameter(torch.ones(9), requires_grad=False)

    def forward(self, x):
        return self.out(self.block(self.emb(x)) * self.scale * self.frozen)


class Even(nn.Module):
    """For tensor parallelism, which wants hidden sizes that divide."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(8, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.emb(x)))


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def make(kind=Uneven):
    torch.manual_seed(0)
    return kind()


def world():
    return dist.get_world_size()


def flat_mesh():
    return init_device_mesh("cpu", (world(),))


def shard(model, mesh=None, **options):
    mesh = flat_mesh() if mesh is None else mesh
    for part in (getattr(model, "block", None), model):
        if part is not None:
            fully_shard(part, mesh=mesh, **options)
    return model


def tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"emb": ColwiseParallel(), "out": RowwiseParallel()})


def adam(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False, **options)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).float().square().mean().backward()
    optimizer.step()


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def live(model):
    return {n: full(t).clone() for n, t in model.state_dict().items()}


def farthest(a, b):
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    return max(float((full(a[n]).double() - full(b[n]).double()).abs().max()) for n in a)


def batches(n, size=4, width=7):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, width, generator=generator) for _ in range(n)]


def agree(model, reference, *, tolerance, split=False, profile=EMA, width=7, **options):
    """Train both with an evaluation on the average after every step; everything must stay together."""
    one, two = (polyak.Average(m, profile, **options) for m in (reference, model))
    first, second = adam(reference), adam(model)
    one.attach(first)
    two.attach(second)
    for x in batches(6, 4 * world() if split else 4, width):
        step(reference, first, x)
        step(model, second, x.chunk(world())[dist.get_rank()] if split else x)
        before = live(model)
        with torch.no_grad(), one.applied(), two.applied():
            error = float((reference(x) - model(x)).abs().max())
        assert error <= tolerance, error
        after = live(model)
        assert all(torch.equal(before[n], after[n]) for n in before)
    assert two.count == 6
    error = farthest(one.averaged_tensors(), two.averaged_tensors())
    assert error <= tolerance, error
    error = farthest(live(reference), live(model))
    assert error <= tolerance, error
    figures = zip(one.metrics().values(), two.metrics().values(), strict=True)
    assert all(abs(a - b) <= 1e-6 * (1 + abs(a)) for a, b in figures)
    return two


def check_fsdp(folder):
    agree(shard(make()), make(), tolerance=0.0)


def check_fsdp_never_resharded_by_itself(folder):
    agree(shard(make(), reshard_after_forward=False), make(), tolerance=0.0)


def check_fsdp_always_resharded(folder):
    agree(shard(make(), reshard_after_forward=True), make(), tolerance=0.0)


def check_split_batches(folder):
    agree(shard(make()), make(), tolerance=2e-7, split=True)


def check_offload_policy(folder):
    policy = CPUOffloadPolicy(pin_memory=False)
    agree(shard(make(), offload_policy=policy), make(), tolerance=0.0)


def check_kept_on_the_host(folder):
    agree(shard(make()), make(), tolerance=0.0, device="cpu")


def check_window(folder):
    agree(shard(make()), make(), tolerance=0.0, profile=polyak.Window(3))


def check_blocks(folder):
    agree(shard(make()), make(), tolerance=0.0, profile=polyak.EMA(decay=0.9999, keep_initial=True))


def check_columns(folder):
    """A shard of columns, and a model that is compiled."""
    columns = {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None}
    if world() == 2:
        agree(shard(make(Even), **columns), make(Even), tolerance=0.0, width=8)


def check_compiled(folder):
    """Compiled around the shards, with a full file loaded in the middle."""
    torch._inductor.config.compile_threads = 1  # no processes of its own
    backend = "inductor" if shutil.which("g++") or shutil.which("c++") else "aot_eager"
    model = torch.compile(shard(make()), backend=backend)
    average = polyak.Average(model, EMA)
    optimizer = adam(model)
    average.attach(optimizer)
    plain = polyak.Average(reference := make(), EMA)
    plain.attach(other := adam(reference))
    for index, x in enumerate(batches(4)):
        step(model, optimizer, x)
        step(reference, other, x)
        with torch.no_grad():
            with average.applied(), plain.applied():
                assert (model(x) - reference(x)).abs().max() <= 2e-7
            assert (model(x) - reference(x)).abs().max() <= 2e-7
        if index == 1:
            if dist.get_rank() == 0:
                plain.save(folder / "full.safetensors")
            dist.barrier()
            average.load(folder / "full.safetensors")
            assert average.count == 2
    assert average.count == 4
    assert farthest(average.averaged_tensors(), plain.averaged_tensors()) <= 2e-7


def agree_when_accumulating(model, reference):
    """Steps of two backward passes, gradients reduced in the second, an evaluation between them."""
    one, two = polyak.Average(reference, EMA), polyak.Average(model, EMA)
    first, second = adam(reference), adam(model)
    one.attach(first)
    two.attach(second)
    for index, x in enumerate(batches(6)):
        model.set_requires_gradient_sync(index % 2 == 1)
        for each in (reference, model):
            each(x).square().mean().backward()
        if index % 2:
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        if index:
            with torch.no_grad(), one.applied(), two.applied():
                assert torch.equal(model(x), reference(x))
    assert two.count == 3
    assert farthest(one.averaged_tensors(), two.averaged_tensors()) == 0
    assert farthest(live(reference), live(model)) == 0


def check_accumulation(folder):
    agree_when_accumulating(shard(make()), make())
    model = shard(make(), reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # gathered all the time
    agree_when_accumulating(model, make())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.out = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.out.weight = self.emb.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mid(self.emb(x))))


def check_other_forms(folder):
    """Some children only, several roots, modules in one group, ties, activations computed again, meta."""
    some, roots, again = make(), make(), make()
    fully_shard(some.block, mesh=flat_mesh())
    for part in (roots.block, roots.emb, roots.out):
        fully_shard(part, mesh=flat_mesh())
    again.block = checkpoint_wrapper(again.block)
    with torch.device("meta"):
        meta = make()
    shard(meta).to_empty(device="cpu")
    for name, tensor in meta.state_dict().items():
        for spans, here in boxes(tensor):
            narrowed(local(tensor), here).copy_(narrowed(make().state_dict()[name], spans))
    for model in (some, roots, shard(again), meta):
        average = agree(model, make(), tolerance=0.0)
        average.save(folder / "form.safetensors", overwrite=True)
        plain = polyak.Average(make(), EMA)
        plain.load(folder / "form.safetensors")
        assert farthest(plain.averaged_tensors(), average.averaged_tensors()) == 0
    tied = make(Tied)
    fully_shard([tied.emb, tied.out], mesh=flat_mesh())
    agree(fully_shard(tied, mesh=flat_mesh()), make(Tied), tolerance=0.0)


def check_mixed_precision(folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(make(), mp_policy=policy)
    average = polyak.Average(model, EMA)
    optimizer = adam(model)
    average.attach(optimizer)
    exact, weight = {}, 0.0
    for x in batches(6):
        step(model, optimizer, x)
        weight = 0.9 * weight + 1
        now = {n: p.double() for n, p in live(model).items()}
        exact = {n: exact.get(n, p) + (p - exact.get(n, p)) / weight for n, p in now.items()}
        with torch.no_grad(), average.applied():
            model(x)
    assert farthest(average.averaged_tensors(), exact) <= 1e-7


def check_bfloat16(folder):
    """Shards are lent in place of their accumulators, without copies, and every bit comes back."""
    packing._COPIED_BYTES, usual = {"cpu": 0}, packing._COPIED_BYTES
    model, reference = shard(make().bfloat16()), make().bfloat16()
    average, plain = polyak.Average(model, polyak.SWA()), polyak.Average(reference, polyak.SWA())
    for x in batches(3):
        x = x.bfloat16()
        with torch.no_grad():
            for p in (*model.parameters(), *reference.parameters()):
                p.mul_(1.25).add_(0.37)
        average.update()
        plain.update()
        own, state = live(model), {n: full(t) for n, t in average.state_dict()["tensors"].items()}
        expected = plain.averaged_tensors()
        with torch.no_grad(), average.applied(), plain.applied():
            assert len(average._member.accumulator.packed) >= 5
            torch.testing.assert_close(model(x), reference(x))
            assert farthest(live(model), expected) == 0
            inside = {n: full(t) for n, t in average.state_dict()["tensors"].items()}
            average.save(folder / "inside.safetensors", overwrite=True)
        average.save(folder / "outside.safetensors", overwrite=True)
        saved = [load_file(folder / f"{name}.safetensors") for name in ("inside", "outside")]
        for name, tensor in state.items():
            assert torch.equal(inside[name], tensor)
            assert torch.equal(full(average.state_dict()["tensors"][name]), tensor)
        for name in expected:
            assert torch.equal(saved[0][name], expected[name])
            assert torch.equal(saved[1][name], expected[name])
        assert farthest(live(model), own) == 0
    packing._COPIED_BYTES = usual


def check_tensor_parallel(folder):
    agree(tensor_parallel(make(Even), flat_mesh()), make(Even), tolerance=2e-7, width=8)


def check_several_averages(folder):
    model, reference = shard(make()), make()
    profiles = {"swa": polyak.SWA(), "ema": EMA}
    several, plain = polyak.Averages(model, profiles), polyak.Averages(reference, profiles)
    optimizer, other = adam(model), adam(reference)
    several.attach(optimizer)
    plain.attach(other)
    for x in batches(3):
        step(model, optimizer, x)
        step(reference, other, x)
        for name in profiles:
            with torch.no_grad(), several[name].applied(), plain[name].applied():
                assert torch.equal(model(x), reference(x))
    dcp.save({"average": several.state_dict()}, checkpoint_id=folder / "several")
    again = polyak.Averages(model, profiles)
    assert polyak.sharded.load(again, folder / "several")
    for name in profiles:
        found = again[name].averaged_tensors()
        assert farthest(found, plain[name].averaged_tensors()) == 0


def trained(reshard=None, n=3, profile=EMA, model=None, **options):
    model = shard(make(), reshard_after_forward=reshard) if model is None else model
    average = polyak.Average(model, profile, **options)
    optimizer = adam(model)
    average.attach(optimizer)
    for x in batches(n):
        step(model, optimizer, x)
    return model, average, optimizer


def zeroed(average):
    state = average.state_dict()
    for tensor in state["tensors"].values():
        local(tensor).zero_()
    average.load_state_dict(state)


def check_a_swap_takes_effect_and_is_undone(folder):
    """With zeros in the average the output must be 0 in the loan, and what it was after it."""
    x = batches(1)[0]
    for reshard in (None, False, True):
        model, average, optimizer = trained(reshard)
        zeroed(average)
        with torch.no_grad():
            before = model(x)  # the root is gathered now, by default
            with average.applied():
                assert model(x).abs().max() == 0
                assert all(t.abs().max() == 0 for t in _trained(average.averaged_tensors()))
                assert model(x).abs().max() == 0
            assert torch.equal(model(x), before)
            model.unshard(async_op=True)  # gathered ahead: before the swap
            with average.applied():
                assert model(x).abs().max() == 0
        assert torch.equal(model(x), before)  # in training
        with torch.inference_mode(), average.applied():
            assert model(x).abs().max() == 0
        assert torch.equal(model(x), before)
        step(model, optimizer, x)


def _trained(tensors):
    return [full(t) for n, t in tensors.items() if n != "frozen"]


def check_a_forward_that_raises_in_the_loan(folder):
    for reshard in (None, False):
        model, average, _ = trained(reshard)
        zeroed(average)
        with torch.no_grad():
            before = model(batches(1)[0])
        handle = model.out.register_forward_hook(_raise)
        try:
            with torch.no_grad(), average.applied():
                model(batches(1)[0])
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("it did not raise")
        handle.remove()
        model.reset_iter_state()
        assert torch.equal(model(batches(1)[0]), before), reshard


def _raise(*args):
    raise ZeroDivisionError


def check_an_exception_on_one_rank(folder):
    model, average, _ = trained()
    before = live(model)
    try:
        with average.applied():
            if dist.get_rank() == 0:
                _raise()
    except ZeroDivisionError:
        pass
    assert all(torch.equal(before[n], t) for n, t in live(model).items())


def check_shapes_are_global_whatever_is_gathered(folder):
    model, average, _ = trained(None)
    expected = {n: tuple(t.shape) for n, t in make().state_dict().items()}
    before = average.averaged_tensors()
    with torch.no_grad():
        model(batches(1)[0])
    assert not isinstance(model.scale, DTensor)
    plan = {row.name: row.shape for row in average.plan().rows}
    assert plan == expected
    found = average.averaged_tensors()
    assert {n: tuple(t.shape) for n, t in found.items()} == expected
    assert all(isinstance(t, DTensor) for t in found.values())
    assert farthest(found, before) == 0
    with torch.no_grad():
        model(batches(1)[0])
    average.update()
    assert average.count == 4
    layer = polyak.Average(model.out, EMA)  # gathered by the module above it
    layer.update()
    with torch.no_grad(), layer.applied():
        model(batches(1)[0])
    assert set(layer.averaged_tensors()) == {"weight", "bias"}


def refused(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"{words}: not refused")


def check_made_before_sharding(folder):
    model = make()
    average = polyak.Average(model, EMA)
    average.update()
    shard(model)
    refused(MismatchError, average.update, "emb.weight: 9x7", "sharded", "after it is sharded")
    refused(MismatchError, average.averaged_tensors, "sharded")
    assert average.count == 1
    late = polyak.Average(make(), EMA)  # not bound yet: nothing is wrong
    shard(late.model)
    late.update()
    assert isinstance(late.averaged_tensors()["scale"], DTensor)


def check_optimizer_made_before_sharding(folder):
    model = make()
    optimizer = adam(model)
    average = polyak.Average(model, EMA)
    average.attach(optimizer)
    shard(model)
    model(batches(1)[0]).sum().backward()
    refused(ArgumentError, optimizer.step, "None of the", "sharded")
    assert average.count == 0
    late = polyak.Average(model, EMA)
    refused(ArgumentError, lambda: late.attach(optimizer), "None of the")


def check_a_step_in_the_loan(folder):
    for attached in (True, False):
        model, average, optimizer = trained()
        if not attached:
            average.detach()
        before = average.averaged_tensors()
        with average.applied():
            model(batches(1)[0]).sum().backward()
            refused(UsageError, optimizer.step, "inside applied()")
            refused(UsageError, average.update, "inside applied()")
        assert farthest(average.averaged_tensors(), before) == 0


def check_nonfinite_on_one_rank(folder):
    for mode in ("skip", "raise"):
        model, average, _ = trained(nonfinite=mode)
        spoiled = local(model.emb.weight)
        kept = spoiled.detach().clone()
        if dist.get_rank() == 0:
            with torch.no_grad():
                spoiled.view(-1)[0] = torch.nan
        if mode == "skip":
            average.update()
            assert average.count == 3
            assert average.metrics()["skipped"] == 1
        else:
            refused(NonFiniteError, average.update, "emb.weight")
        with torch.no_grad():
            spoiled.copy_(kept)
        average.update()
        assert average.count == 4
    if dist.get_rank() == 1:
        average.state_dict()["tensors"]["out.bias"]._local_tensor.fill_(torch.nan)
        local(average.state_dict()["tensors"]["emb.bias"]).fill_(torch.inf)
    refused(NonFiniteError, lambda: average.applied(check=True).__enter__(), "emb.bias")
    refused(NonFiniteError, lambda: average.save(folder / "bad.safetensors"), "emb.bias")


def check_update_bn(folder):
    model, reference = shard(make(Normed)), make(Normed)
    data = batches(8)
    averages = [polyak.Average(m, polyak.SWA()) for m in (model, reference)]
    for average in averages:
        average.update()
    mine = data[dist.get_rank() :: world()]
    averages[0].update_bn(mine)
    with torch.no_grad():
        reference[1].momentum = None
        reference[1].reset_running_stats()
        hidden = torch.cat([reference[0](x) for x in data])
    found = averages[0].averaged_tensors()
    assert (found["1.running_mean"] - hidden.mean(0)).abs().max() <= 1e-7
    assert (found["1.running_var"] - hidden.var(0)).abs().max() <= 1e-6
    assert int(found["1.num_batches_tracked"]) == 8
    uneven = data[: 2 + dist.get_rank()]
    before = averages[0].averaged_tensors()
    refused(ArgumentError, lambda: averages[0].update_bn(uneven), "2, 3")
    refused(ArgumentError, lambda: averages[0].update_bn(iter(uneven)), "2, more than 2")
    averages[0].update_bn(uneven, limit=2)
    averages[0].update_bn(iter(mine))
    assert farthest(averages[0].averaged_tensors(), before) == 0


def check_update_bn_of_tensor_parallelism(folder):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(8), Even()

        def forward(self, x):
            return self.inner(self.norm(x))

    model = make(Both)
    tensor_parallel(model.inner, flat_mesh())
    data = batches(5, width=8)
    polyak.update_bn(model, data)
    whole = torch.cat(data)
    assert (model.norm.running_var - whole.var(0)).abs().max() <= 1e-6
    assert int(model.norm.num_batches_tracked) == 5


def check_save_and_load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, average, _ = trained()
        average.save(folder / "full.safetensors")
        average.save(folder / "full.safetensors", overwrite=True)
    refused(ArgumentError, lambda: average.save(folder / "full.pt"), ".safetensors")
    plain = polyak.Average(make(), EMA)
    plain.load(folder / "full.safetensors")
    assert farthest(plain.averaged_tensors(), average.averaged_tensors()) == 0
    again = polyak.Average(model, EMA)
    again.load(folder / "full.safetensors")
    assert again.count == 3
    assert farthest(again.averaged_tensors(), average.averaged_tensors()) == 0
    if dist.get_rank() == 0:
        torch.save(plain.state_dict(), folder / "state.pt")
        torch.save(plain.averaged_tensors(), folder / "plain.pt")
        (folder / "config").mkdir()
        (folder / "config" / "config.json").write_text("{}")
    dist.barrier()
    for name, updates in (("state.pt", None), ("plain.pt", 3)):
        again = polyak.Average(model, EMA)
        again.load(folder / name, updates=updates)
        assert farthest(again.averaged_tensors(), average.averaged_tensors()) == 0
    average.save(folder / "parts", shards=True, carry=folder / "config")
    assert {p.name for p in (folder / "parts").iterdir()} == {"model.safetensors", "config.json"}
    average.copy_to(model)
    assert farthest(model.state_dict(), average.averaged_tensors()) == 0
    refused(MismatchError, lambda: average.copy_to(make()), "sharded")


def check_saved_by_parts(folder):
    """What a block, a window or another dtype makes necessary to compute is computed in small pieces."""
    kept, collective.SCRATCH = collective.SCRATCH, 16
    for name, profile in PROFILES.items():
        for dtype in (torch.float32, torch.bfloat16):
            models = [shard(make().to(dtype)), make().to(dtype)]
            averages = [polyak.Average(model, profile) for model in models]
            for factor in (1.0, 0.7, 0.3):
                for model, average in zip(models, averages, strict=True):
                    for tensor in model.state_dict().values():
                        local(tensor).mul_(factor)
                    average.update()
            averages[0].save(folder / f"{name}-{dtype}.safetensors")
            found = load_file(folder / f"{name}-{dtype}.safetensors")
            assert found["emb.weight"].dtype == dtype
            assert farthest(found, averages[1].averaged_tensors()) == 0, (name, dtype)
    collective.SCRATCH = kept


def check_boxes(folder):
    """Every value is in one box of one rank, and where it says."""
    whole = torch.arange(77.0).view(7, 11)
    for placements in ([Shard(0)], [Shard(1)]):
        tensor = distribute_tensor(whole, flat_mesh(), placements)
        for spans, here in boxes(tensor):
            assert torch.equal(narrowed(local(tensor), here), narrowed(whole, spans))


def check_distributed_checkpoint(folder):
    for name, profile in PROFILES.items():
        model, average, _ = trained(profile=profile)
        dcp.save({"average": average.state_dict()}, checkpoint_id=folder / name)
        torch.save(live(model), folder / "live.pt")
        average.update()
        torch.save(
            {n: full(t) for n, t in average.averaged_tensors().items()}, folder / f"{name}.pt"
        )


PROFILES = {
    "dcp-ema": EMA,
    "dcp-window": polyak.Window(2),
    "dcp-block": polyak.EMA(decay=0.9999, keep_initial=True),
}


def check_missing_and_mismatched(folder):
    model, average, _ = trained()
    dcp.save(
        {"average": average.state_dict(), "model": model.state_dict()}, checkpoint_id=folder / "m"
    )
    load = polyak.sharded.load
    refused(MismatchError, lambda: load(average, folder / "m", key="ema"), "average", "model")
    assert load(average, folder / "m", key="ema", missing="model") is False
    assert average.empty
    assert load(average, folder / "m")
    assert average.count == 3
    other = polyak.Average(model, polyak.SWA())
    refused(MismatchError, lambda: load(other, folder / "m"), "profile")
    other = polyak.Average(shard(make(Even)), EMA)
    refused(MismatchError, lambda: load(other, folder / "m"), "scale", "emb.weight")
    refused(ArgumentError, lambda: load(other, folder / "nowhere"), "no distributed checkpoint")
    refused(PolyakError, lambda: load(other, folder / "m", key="model"), "polyak average")
    assert other.empty


def check_async_save(folder):
    model, average, optimizer = trained()
    then = {n: full(t).clone() for n, t in average.averaged_tensors().items()}
    group = dist.new_group(backend="gloo")
    future = dcp.async_save(
        {"average": average.state_dict()}, checkpoint_id=folder / "async", process_group=group
    )
    for x in batches(5):
        step(model, optimizer, x)
    future.result()
    resumed = polyak.Average(model, EMA)
    polyak.sharded.load(resumed, folder / "async")
    assert average.count == 8
    assert resumed.count == 3
    assert farthest(resumed.averaged_tensors(), then) == 0


def check_hsdp(folder):
    if world() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        average = agree(shard(make(), mesh), make(), tolerance=0.0)
        average.save(folder / "hsdp.safetensors")
        plain = polyak.Average(make(), EMA)
        plain.load(folder / "hsdp.safetensors")
        assert farthest(plain.averaged_tensors(), average.averaged_tensors()) == 0


def check_fsdp_over_tensor_parallelism(folder):
    if world() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        model = shard(tensor_parallel(make(Even), mesh["model"]), mesh["data"])
        average = agree(model, make(Even), tolerance=2e-7, width=8)
        average.save(folder / "both.safetensors")
        plain = polyak.Average(make(Even), EMA)
        plain.load(folder / "both.safetensors")
        assert farthest(plain.averaged_tensors(), average.averaged_tensors()) == 0
        again = polyak.Average(model, EMA)
        again.load(folder / "both.safetensors")
        assert farthest(again.averaged_tensors(), average.averaged_tensors()) == 0


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}
# Those of which four ranks may show something that two do not.
ON_FOUR = (
    "fsdp",
    "split_batches",
    "hsdp",
    "fsdp_over_tensor_parallelism",
    "boxes",
    "tensor_parallel",
)


def run(rank, n_ranks, folder, names):
    """One rank: run the checks, and write what each has said."""
    torch.set_num_threads(1)
    place = Path(folder, str(n_ranks))
    place.mkdir(exist_ok=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=n_ranks
    )
    run_checks({name: CHECKS[name] for name in names}, place / f"{rank}.json", place)
    dist.destroy_process_group()


def run_resume(rank, n_ranks, folder, saved):
    """One rank of others than those that saved."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    said = {"resume": "ok"}
    try:
        if n_ranks > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/resume-{n_ranks}",
                rank=rank,
                world_size=n_ranks,
            )
        model = make()
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names) if n_ranks == 4 else None
        model = model if n_ranks == 1 else shard(model, mesh)
        weights = torch.load(Path(saved, "live.pt"))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                whole = weights[name]
                for spans, here in boxes(tensor):
                    narrowed(local(tensor), here).copy_(narrowed(whole, spans))
        for name, profile in PROFILES.items():
            average = polyak.Average(model, profile)
            assert polyak.sharded.load(average, Path(saved, name))
            assert average.count == 3
            average.update()
            error = farthest(average.averaged_tensors(), torch.load(Path(saved, f"{name}.pt")))
            assert error <= 2e-8, (name, error)
    except BaseException:
        said = {"resume": traceback.format_exc()}
    Path(folder, f"resume-{n_ranks}-{rank}.json").write_text(json.dumps(said))
