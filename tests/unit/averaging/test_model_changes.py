"""What happens to each tensor of a model, and what an average makes of a model that changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.errors import ArgumentError, MismatchError, StaleStatistics, UsageError


def shift(model, by=1.0):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def two_updates(average):
    average.update()
    shift(average.model)
    average.update()
    return average


class Odd(nn.Module):
    """One tensor of every kind."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("counter", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor([0.0]))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.tied = self.weight


def test_the_plan_says_what_happens_and_why():
    plan = Average(Odd(), SWA()).plan()
    kinds = {row.name: row.kind for row in plan.rows}
    assert kinds == {
        "weight": "averaged",
        "frozen": "newest",
        "norm.weight": "averaged",
        "norm.bias": "averaged",
        "norm.running_mean": "statistic",
        "norm.running_var": "statistic",
        "norm.num_batches_tracked": "statistic",
        "counter": "newest",
        "mask": "newest",
        "scale": "newest",
        "scratch": "newest",
        "tied": "tied",
    }
    text = str(plan)
    assert "costs nothing" in text
    assert "the same tensor as weight" in text
    assert plan.nbytes == (3 + 2 + 2) * 4 + 2 * 2 * 4 + 8
    assert len({line.index("why") for line in text.splitlines()[:1]}) == 1


def test_counters_and_masks_are_of_the_newest():
    model = Odd()
    average = two_updates(Average(model, SWA()))
    with torch.no_grad():
        model.counter.add_(993)
        model.mask.logical_not_()
    found = average.averaged_tensors()
    assert found["counter"] == 1000
    assert found["mask"].tolist() == [False, True]
    assert found["weight"].tolist() == [0.5] * 3
    assert found["tied"].tolist() == [0.5] * 3
    assert "scratch" not in found
    assert set(found) == set(model.state_dict())
    model.load_state_dict(found)


def test_buffers_are_averaged_by_name_only():
    model = Odd()
    average = Average(model, SWA(), average_buffers="scale")
    average.update()
    model.scale.add_(4)
    average.update()
    assert average.averaged_tensors()["scale"].item() == 2.0


def test_include_and_exclude():
    model = nn.ModuleDict(
        {"base": nn.Linear(2, 2), "lora_a": nn.Linear(2, 2), "head": nn.Linear(2, 1)}
    )
    model.base.requires_grad_(False)
    lora = two_updates(Average(model, SWA(), include="lora*"))
    assert set(lora.state_dict()["tensors"]) == {"lora_a.weight", "lora_a.bias"}
    headless = two_updates(Average(model, SWA(), exclude=["head.*"]))
    assert set(headless.state_dict()["tensors"]) == {"lora_a.weight", "lora_a.bias"}
    frozen_too = two_updates(Average(model, SWA(), include=["base.weight"]))
    assert set(frozen_too.state_dict()["tensors"]) == {"base.weight"}
    with lora.applied():
        assert torch.equal(model.head.weight, frozen_too.averaged_tensors()["head.weight"])


@pytest.mark.parametrize("argument", ["include", "exclude", "average_buffers"])
def test_a_pattern_that_fits_nothing_is_refused(argument):
    average = Average(Odd(), SWA(), **{argument: "lorra*"})
    with pytest.raises(ArgumentError, match=rf"{argument}='lorra\*' matches no tensor"):
        average.update()


def test_a_model_with_nothing_to_average_is_refused():
    with pytest.raises(ArgumentError, match="Nothing to average"):
        Average(nn.Linear(2, 2).requires_grad_(False), SWA()).update()


def test_frozen_parameters_cost_nothing_and_show_the_live_value():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    average = two_updates(Average(model, SWA()))
    assert set(average.state_dict()["tensors"]) == {"1.weight", "1.bias"}
    assert torch.equal(average.averaged_tensors()["0.weight"], model[0].weight)


def test_freezing_in_mid_run_goes_on_averaging():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    average = two_updates(Average(model, SWA()))
    model[0].requires_grad_(False)
    average.update()
    average.update()
    torch.testing.assert_close(average.averaged_tensors()["0.weight"], model[0].weight - 0.25)


@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.99999, keep_initial=True), Window(3)])
def test_thawing_is_noticed_by_the_hook_before_the_first_step(profile):
    def train(*, include):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = Average(model, profile, include=include)
        average.attach(optimizer)
        for index in range(6):
            if index == 3:
                model[0].requires_grad_(True)
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
        return average

    lazy, eager = train(include=None), train(include="*")
    torch.testing.assert_close(lazy.averaged_tensors(), eager.averaged_tensors(), rtol=0, atol=1e-7)
    assert "trains since it was unfrozen" in str(lazy.plan())


def test_thawing_without_a_hook_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    average = two_updates(Average(model, SWA()))
    model.requires_grad_(True)
    with pytest.raises(MismatchError, match=r"0\.weight: was frozen when averaging began"):
        average.update()
    assert average.count == 2


def test_a_lazy_module_is_taken_up_once_it_is_made():
    model = nn.Sequential(nn.LazyLinear(2), nn.ReLU())
    average = Average(model, SWA())
    with pytest.raises(UsageError, match=r"0\.weight, 0\.bias: a lazy module"):
        average.update()
    model(torch.ones(1, 3))
    two_updates(average)
    assert average.averaged_tensors()["0.weight"].shape == (2, 3)


CHANGES = {
    "a layer added": (lambda m: m.append(nn.Linear(1, 1)), r"unexpected \(2\): 2\.bias, 2\.weight"),
    "a layer removed": (lambda m: m.__delitem__(1), r"missing \(2\): 1\.bias, 1\.weight"),
    "a parameter added": (
        lambda m: m[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
        r"unexpected \(1\): 0\.extra",
    ),
    "a parameter removed": (
        lambda m: m[0].register_parameter("bias", None),
        r"missing \(1\): 0\.bias",
    ),
    "reshaped": (lambda m: m.__setitem__(1, nn.Linear(2, 5)), r"1\.weight: 5x2 .*was 1x2"),
    "reshaped in place": (
        lambda m: setattr(m[1].weight, "data", m[1].weight.data[:, :1]),
        r"1\.weight: 1x1 .*was 1x2",
    ),
    "converted": (lambda m: m.half(), r"0\.weight: 2x3 float16 on cpu, was 2x3 float32 on cpu"),
    "moved": (lambda m: m.to("meta"), r"0\.weight: 2x3 float32 on meta, was"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_is_refused_by_name_before_anything_is_written(change, message):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    averages = Averages(model, {"one": SWA(), "two": EMA(decay=0.5)})
    averages.update()
    before = copy.deepcopy(averages.state_dict())
    change(model)
    with pytest.raises(MismatchError, match=message):
        averages.update()
    after = averages.state_dict()
    for name in before:
        assert before[name]["count"] == after[name]["count"]
        for key, value in before[name]["tensors"].items():
            assert torch.equal(value, after[name]["tensors"][key])


def test_replaced_tensors_of_the_same_name_are_followed():
    model = nn.Sequential(nn.Linear(3, 2))
    average = Average(model, SWA())
    average.update()
    first = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(first + 1)  # as load_state_dict(assign=True) does
    average.update()
    model[0].weight.data = first + 2
    average.update()
    torch.testing.assert_close(average.averaged_tensors()["0.weight"], first + 1)


@pytest.mark.parametrize("profiles", [{"swa": SWA()}, {"window": Window(4), "swa": SWA()}])
@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((3, 3), lambda x: x.t()),
        ((2, 3), lambda x: x.reshape(3, 2).t()),
        ((2, 4, 3, 3), lambda x: x.reshape(2, 3, 3, 4).permute(0, 3, 1, 2)),
    ],
    ids=["transposed", "columns first", "channels last"],
)
def test_the_same_memory_in_another_order_is_followed(shape, other, profiles):
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape))
    averages = Averages(model, profiles)
    taken = []
    for turn in (False, True, True):
        if turn:
            model.w.data = other(model.w.data)
        taken.append(model.w.detach().clone())
        averages.update()
    assert model.w.shape == torch.Size(shape)
    for average in averages.values():
        found = average.averaged_tensors()["w"]
        torch.testing.assert_close(found, torch.stack(taken).mean(0))


def test_an_average_does_not_hold_what_the_model_has_let_go():
    model = nn.Linear(4, 4)
    average = Average(model, SWA())
    average.update()
    old = StorageWeakRef(model.weight.untyped_storage())
    model.weight.data = torch.zeros(4, 4)
    assert old.expired()
    average.update()
    assert average.count == 2


def test_a_reregistered_buffer_changes_no_order():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(2))
    model.register_buffer("b", torch.zeros(2))
    model.w = nn.Parameter(torch.zeros(1))
    average = Average(model, SWA(), average_buffers=["a", "b"])
    average.update()
    a = model.a + 2
    del model.a
    model.register_buffer("a", a)
    average.update()
    found = average.averaged_tensors()
    assert (found["a"].tolist(), found["b"].tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_buffers_may_come_go_and_change_shape():
    model = Odd()
    average = two_updates(Average(model, SWA()))
    model.register_buffer("cache", torch.zeros(5))
    model.scale = torch.zeros(9)
    del model.mask
    average.update()
    assert average.averaged_tensors()["scale"].shape == (9,)


def test_wrappers_prefixes_are_taken_off():
    inner = nn.Linear(2, 2)
    for wrapped in (
        nn.DataParallel(inner),
        torch.compile(inner, backend="eager"),
        nn.DataParallel(torch.compile(inner, backend="eager")),
    ):
        average = two_updates(Average(wrapped, SWA()))
        assert set(average.state_dict()["tensors"]) == {"weight", "bias"}
        average.copy_to(inner)
    theirs = Average(torch.optim.swa_utils.AveragedModel(inner), SWA())
    assert set(two_updates(theirs).state_dict()["tensors"]) == {"weight", "bias"}
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a name of one's own stays
    assert set(two_updates(Average(own, SWA())).state_dict()["tensors"]) == {
        "module.weight",
        "module.bias",
    }


def test_checkpoint_wrappers_are_taken_off():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert set(two_updates(Average(model, SWA())).averaged_tensors()) == {"0.weight", "0.bias"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_deepcopied_is_averaged():
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    model(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    two_updates(Average(model, SWA()))


def test_a_shared_module_is_averaged_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    average = two_updates(Average(model, SWA()))
    assert set(average.state_dict()["tensors"]) == {"0.weight", "0.bias"}
    found = average.averaged_tensors()
    assert found["2.weight"] is found["0.weight"]
    model.load_state_dict(found)


@pytest.mark.parametrize(
    ("dtype", "asked", "kept"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.float32, None, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.complex64, None, torch.complex64),
        (torch.complex64, torch.float64, torch.complex128),
        (torch.float8_e4m3fn, None, torch.float32),
    ],
)
def test_accumulators_and_results_have_their_dtypes(dtype, asked, kept):
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4).to(dtype))
    average = Average(model, SWA(), dtype=asked)
    average.update()
    model.w.data = (3 * torch.ones(4)).to(dtype)
    average.update()
    assert average.state_dict()["tensors"]["w"].dtype is kept
    found = average.averaged_tensors()["w"]
    assert found.dtype is dtype
    assert found.to(torch.complex64).real.tolist() == [2.0] * 4


def test_large_tensors_of_another_dtype_are_converted_in_pieces():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(700, 800).bfloat16())
    model.v = nn.Parameter(torch.zeros(300, 4).bfloat16().t())
    average = Average(model, SWA())
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.w.fill_(value)
            model.v.fill_(value)
        average.update()
    for tensor in average.state_dict()["tensors"].values():
        assert tensor.unique().tolist() == [1.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.complex64])
def test_a_dtype_that_stalls_is_refused(dtype):
    with pytest.raises(ArgumentError, match=r"expected torch\.float32 or torch\.float64"):
        Average(Odd(), SWA(), dtype=dtype)


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ArgumentError, match="average_checkpoints"):
        Average(Odd(), polyak.Annealed.from_shape("cosine"))
    with pytest.raises(ArgumentError, match="torch module"):
        Average([nn.Linear(1, 1)], SWA())
    with pytest.raises(ArgumentError, match="nonfinite"):
        Average(Odd(), SWA(), nonfinite="warn")
    with pytest.raises(ArgumentError, match="profiles by name"):
        Averages(Odd(), {})


class TestNonFinite:
    def poisoned(self, mode):
        model = nn.Linear(3, 2)
        average = Average(model, SWA(), nonfinite=mode)
        average.update()
        good = {n: t.clone() for n, t in average.averaged_tensors().items()}
        with torch.no_grad():
            model.bias[1] = float("inf")
        return model, average, good

    def test_skip_weighs_nothing(self):
        _, average, good = self.poisoned("skip")
        average.update()
        assert (average.count, average.time) == (1, 1)
        assert average.metrics()["skipped"] == 1
        torch.testing.assert_close(average.averaged_tensors(), good, rtol=0, atol=0)

    def test_raise_names_the_tensor(self):
        _, average, _ = self.poisoned("raise")
        with pytest.raises(polyak.PolyakError, match=r"NaN or infinity in bias\."):
            average.update()
        assert average.count == 1

    def test_large_finite_values_are_finite(self):
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 3e38)
        Average(model, SWA(), nonfinite="raise").update()


def test_metrics():
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, SWA())
    assert all(v != v for k, v in average.metrics().items() if k != "skipped")
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(model.weight, value)
        average.update()
    found = average.metrics()
    assert found["distance"] == pytest.approx(3.0)
    assert found["relative_distance"] == pytest.approx(0.5)
    assert found["effective_samples"] == pytest.approx(3.0)
    assert found["mean_age"] == 1.5
    assert found["next_share"] == 0.25


@pytest.mark.parametrize("profile", [EMA(decay=0.9), polyak.PowerEMA(gamma=3), Window(4), SWA()])
def test_effective_samples_agree_with_the_profile(profile):
    model = nn.Linear(2, 1)
    average = Average(model, profile)
    for _ in range(9):
        average.update()
    expected = profile.effective_samples(range(1, 10))
    assert average.metrics()["effective_samples"] == pytest.approx(expected)


def test_updates_in_inference_mode():
    model = nn.Linear(3, 2)
    average = Average(model, EMA(decay=0.99999, keep_initial=True))
    with torch.inference_mode():
        average.update()
        average.update()
    shift(model)
    average.update()
    with average.applied(in_place=True):
        pass


def test_time_kept_on_the_device_counts_the_same():
    model = nn.Linear(3, 2)
    profile = EMA(decay=0.9999, keep_initial=True)
    host, device = Average(model, profile), Average(model, profile, capturable=True)
    for _ in range(6):
        host.update(2)
        device.update(2)
        shift(model)
    assert (device.time, device.count) == (host.time, host.count) == (10, 6)
    assert device._member.clock.on_device
    assert device._member.accumulator.swap_targets()
    assert not host._member.accumulator.swap_targets()  # blocks are for times on the host
    torch.testing.assert_close(device.averaged_tensors(), host.averaged_tensors())
    assert device.metrics()["effective_samples"] == pytest.approx(
        host.metrics()["effective_samples"]
    )


def test_what_a_graph_may_hold_the_address_of_stays_where_it_is():
    """Replays of a CUDA graph move the time and the average at the addresses that it was captured with."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other = Average(model, SWA(), capturable=True)
    average = Average(model, SWA(), capturable=True)
    with torch.inference_mode():  # what is made here has to be written to outside
        average.update()
    saved = copy.deepcopy(average.state_dict())

    def addresses():
        member = average._member
        clock = member.clock
        kept = [clock.time, clock.count, clock.sum_squared_shares]
        return [t.data_ptr() for t in (*kept, *member.accumulator.tensors, *member.statistics)]

    def measure():
        with average.applied(), torch.inference_mode():
            polyak.update_bn(model, [torch.randn(9, 3)])

    before = addresses()
    actions = [average.update, average.reset, average.update, average.update, measure, measure]
    for act in [*actions, lambda: average.load_state_dict(saved), average.update]:
        shift(model)
        act()
        assert addresses() == before
    assert (average.time, average.count) == (2, 2)
    average.reset()
    assert (average.time, average.count) == (0, 0)
    with torch.no_grad():
        model[0].weight.fill_(0.1)
    for one in (average, other):
        one.update()
    assert torch.equal(average.averaged_tensors()["0.weight"], model[0].weight)
    assert average.metrics() == other.metrics()


@pytest.mark.parametrize("std", [0.05, 0.10, 0.28])
@pytest.mark.parametrize("every", [1, 10, 100])
def test_a_power_average_has_the_width_asked_for_whatever_the_interval(std, every):
    """Peers that leave the interval out of the formula measure .24 where .05 was asked for."""
    n_steps = 20_000
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = Average(model, polyak.PowerEMA.from_relative_std(std))
    for step in range(every, n_steps + 1, every):
        u = step / n_steps
        with torch.no_grad():
            model.w.copy_(torch.tensor([u, u * u]))
        average.update(every)
    mean, square = average.averaged_tensors()["w"].tolist()
    assert (square - mean * mean) ** 0.5 == pytest.approx(std, rel=0.01)


def test_results_are_plain_tensors():
    found = two_updates(Average(Odd(), SWA())).averaged_tensors()
    assert not any(
        tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in found.values()
    )


def test_reading_notices_a_changed_model_too():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    average = two_updates(Average(model, SWA()))
    del model[1]
    for read in (average.averaged_tensors, average.metrics, average.applied().__enter__):
        with pytest.raises(MismatchError, match=r"missing \(2\)"):
            read()
    model.append(nn.Linear(2, 1))
    model.register_buffer("late", torch.zeros(1))
    assert "late" in average.averaged_tensors()


def test_reading_between_thawing_and_the_first_step():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, SWA())
    average.attach(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.requires_grad_(True)
    before = model[0].weight.detach().clone()
    with average.applied():
        assert torch.equal(model[0].weight, before)
    assert "0.weight" in average.state_dict()["tensors"]


class OwnNorm(nn.Module):
    """A layer that keeps running statistics, and is none of torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return (x - self.running_mean) * self.weight


class TestStatisticsThatNobodyCanMeasure:
    def test_update_bn_says_so_and_they_stay_stale(self, tmp_path):
        average = Average(nn.Sequential(nn.Linear(3, 3), OwnNorm()), SWA())
        average.update()
        with pytest.warns(StaleStatistics, match="1 are not torch BatchNorm"):
            average.update_bn([torch.randn(4, 3)])
        with pytest.warns(StaleStatistics):
            average.save(tmp_path / "a.safetensors")

    def test_measured_by_hand_they_are_fresh(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), OwnNorm())
        average = Average(model, SWA())
        average.update()
        model.eval()
        with average.applied():
            model[1].running_mean.fill_(2.0)
        average.save(tmp_path / "a.safetensors")  # no warning: they would be errors here

    def test_constants_of_a_frozen_layer_are_no_statistics(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), OwnNorm())
        model[1].requires_grad_(False)
        average = Average(model, SWA())
        average.update()
        average.update_bn([torch.randn(4, 3)])
        average.save(tmp_path / "a.safetensors")

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_a_scripted_model(self):
        model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        average = Average(model, SWA())
        average.update()
        with pytest.warns(StaleStatistics):
            average.update_bn([torch.randn(4, 3)])
        with pytest.warns(StaleStatistics), average.applied():
            model(torch.randn(4, 3))


@pytest.mark.parametrize(
    "build", [lambda m: Average(m, SWA()), lambda m: Averages(m, {"swa": SWA()})]
)
def test_what_is_no_module_is_refused_at_once(build):
    with pytest.raises(ArgumentError, match="needs a torch module; found list"):
        build([torch.zeros(2)])
