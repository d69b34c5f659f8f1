"""`predict`: the mean of what members say, whatever they are, and nothing changed by it."""

from __future__ import annotations

import math

import pytest
import torch
from reference import readouts as reference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak import schedules
from polyak.errors import ArgumentError, MismatchError, NonFiniteError, PolyakError, UsageError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


def inputs(n=24):
    torch.manual_seed(9)
    return torch.randn(n, 3)


def loader(x=None, **options):
    x = inputs() if x is None else x
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 4), batch_size=10, **options)


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@torch.no_grad()
def probabilities(model):
    modes = [module.training for module in model.modules()]
    found = model.eval()(inputs()).double().softmax(1)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return found


@torch.no_grad()
def walk(model, n, update):
    for seed in range(n):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        update()


def test_a_deep_ensemble_against_a_twin():
    models = [net(seed) for seed in range(3)]
    before = list(map(values, models))
    prediction = polyak.predict(models, loader())
    each = [probabilities(model).tolist() for model in models]
    for i, one in enumerate(zip(*each, strict=True)):
        mean, entropy, information = reference.mixture(one)
        assert torch.allclose(prediction.probabilities[i], torch.tensor(mean, dtype=torch.float64))
        assert math.isclose(prediction.entropy[i], entropy, rel_tol=1e-5)
        assert math.isclose(prediction.mutual_information[i], information, abs_tol=1e-6)
    assert prediction.members == 3
    assert all(map(same, before, map(values, models)))
    assert all(module.training for model in models for module in model.modules())


def test_modes_of_single_layers_come_back():
    model = net()
    model[1].eval()
    polyak.predict(model, loader())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_a_swag_is_the_mean_over_its_draws_and_several_are_multiswag():
    swags, each = [], []
    for seed in (0, 1):
        model = net(seed)
        swag = polyak.SWAG(model, rank=3)
        walk(model, 4, swag.update)
        swags.append(swag)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            with swag.sample(generator=generator, update_bn=[inputs()], scale=0.5):
                each.append(probabilities(model))
    for seed, swag in enumerate(swags):
        generator = torch.Generator().manual_seed(seed)
        found = swag.predict(
            loader(), draws=3, generator=generator, update_bn=[inputs()], scale=0.5
        )
        assert torch.allclose(found.probabilities, torch.stack(each[3 * seed :][:3]).mean(0))
        assert found.members == 3
    both = polyak.predict(swags, loader(), draws=2, update_bn=[inputs()])
    assert both.members == 4


def test_draws_of_one_swag_share_its_part():
    model = net(1)
    swag = polyak.SWAG(model, rank=2)
    walk(model, 3, swag.update)
    other = net(2)
    options = {"draws": 3, "scale": 0, "update_bn": [inputs()]}
    alone = polyak.predict(swag, loader(), **options).probabilities  # 3 times the mean
    together = polyak.predict([swag, other], loader(), **options)
    assert torch.allclose(together.probabilities, (alone + probabilities(other)) / 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models of one kind, each in a file of another kind; and their state dicts."""
    folder = tmp_path_factory.mktemp("members")
    models = [net(seed) for seed in range(4)]
    torch.save(models[0].state_dict(), folder / "0.pt")
    torch.save({"model": models[1].state_dict(), "step": 3}, folder / "1.ckpt")
    average = polyak.Average(models[2], polyak.SWA())
    average.update()
    average.update_bn([inputs()])
    average.save(folder / "2.safetensors")
    average.copy_to(models[2])
    wrapped = {f"module.{name}": tensor for name, tensor in models[3].state_dict().items()}
    return [folder / "0.pt", str(folder / "1.ckpt"), folder / "2.safetensors", wrapped], models


def test_files_and_state_dicts_are_members_of_one_model(saved):
    files, models = saved
    model = net(7)
    before = values(model)
    prediction = polyak.predict(files, loader(), model=model)
    expected = torch.stack(list(map(probabilities, models))).mean(0)
    assert torch.allclose(prediction.probabilities, expected)
    assert same(values(model), before)
    one = polyak.predict(files[0], loader(), model=model)
    assert torch.allclose(one.probabilities, probabilities(models[0]))


def test_frozen_weights_and_buffers_come_from_the_file_too():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.linear.bias.requires_grad_(False)
            self.register_buffer("scale", torch.tensor(scale))
            self.register_buffer("cache", torch.ones(1), persistent=False)

        def forward(self, x):
            return self.linear(x) * self.scale * self.cache

    stored, model = Scaled(3.0), Scaled(1.0)
    found = polyak.predict(stored.state_dict(), loader(), model=model)
    assert torch.allclose(found.probabilities, probabilities(stored))


def test_a_saved_swag_is_drawn_from(tmp_path):
    model = net()
    swag = polyak.SWAG(model, rank=3)
    walk(model, 4, swag.update)
    swag.save(tmp_path / "swag.safetensors")
    options = {"draws": 2, "update_bn": [inputs()]}
    found = [
        polyak.predict(
            one, loader(), model=model, generator=torch.Generator().manual_seed(3), **options
        )
        for one in (swag, tmp_path / "swag.safetensors")
    ]
    assert torch.equal(found[0].logits, found[1].logits)


@pytest.mark.parametrize("make", ["snapshot", "fast geometric"])
def test_the_averaging_points_of_a_run_are_an_ensemble(tmp_path, make):
    # Snapshots at the low points of cycles, written by a recorder; FGE's cycles are triangles.
    cycle = (
        schedules.CyclicLinear(high=0.1, low=0.01, cycle=4)
        if make == "snapshot"
        else schedules.Triangular(high=0.1, low=0.01, cycle=4)
    )
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr = polyak.LRSchedule(optimizer, cycle)
    taken = []
    with polyak.Recorder(model, tmp_path, interval=1, captures=1, unit="captures") as recorder:
        recorder.attach(optimizer, at=lr)
        for step in range(1, 17):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs()), torch.arange(24) % 4).backward()
            optimizer.step()
            lr.step()
            if step in cycle.averaging_points(16):
                taken.append(probabilities(model))
    found = polyak.predict(polyak.Trajectory(tmp_path), loader(), model=model)
    assert found.members >= len(taken) >= 3
    some = polyak.predict(polyak.Trajectory(tmp_path).intervals[-1].path, loader(), model=model)
    assert torch.allclose(some.probabilities, taken[-1])


def test_an_average_predicts_with_its_own_weights_and_statistics():
    model = net()
    average = polyak.Average(model, polyak.SWA())
    walk(model, 4, average.update)
    found = polyak.predict(average, loader(), update_bn=[inputs()])
    with average.applied():
        assert torch.allclose(found.probabilities, probabilities(model))
    averages = polyak.Averages(model, {"a": polyak.SWA(), "b": polyak.EMA(decay=0.5)})
    averages.update()
    assert polyak.predict(averages, loader(), update_bn=[inputs()]).members == 2


def test_dicts_go_through_forward_and_probabilities_are_taken_as_they_are():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, pixels):
            return {"loss": None, "logits": self.linear(pixels)}

    model = Named()
    batches = [{"pixels": inputs()}]
    with pytest.raises(ArgumentError, match="dict with loss, logits"):
        polyak.predict(model, batches)
    a = polyak.predict(model, batches, forward=lambda model, batch: model(**batch)["logits"])
    b = polyak.predict(
        model,
        batches,
        forward=lambda model, batch: model(**batch)["logits"].softmax(-1),
        outputs="probabilities",
    )
    assert torch.allclose(a.logits, b.logits, atol=1e-5)


def test_a_certain_and_wrong_member_leaves_a_finite_likelihood():
    certain = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    model = nn.Identity()
    found = polyak.predict(model, certain, outputs="probabilities")
    scores = found.scores(torch.tensor([1, 0]))
    assert 700 < scores["nll"] < 710
    assert float(found.entropy.abs().max()) < 1e-300
    extreme = polyak.predict(model, [torch.tensor([[5000.0, -5000.0]])])
    assert extreme.scores(torch.tensor([1]))["nll"] == 10_000


def test_moments_of_real_numbers():
    torch.manual_seed(0)
    means, variances = torch.randn(2, 3, 24, 2, dtype=torch.float64).unbind()
    variances = variances.square()
    models = [nn.Linear(1, 1) for _ in range(3)]
    index = {id(model): m for m, model in enumerate(models)}

    def forward(model, batch):
        m = index[id(model)]
        return means[m][batch].float(), variances[m][batch].float()

    batches = [torch.arange(10), torch.arange(10, 24)]
    found = polyak.predict(models, batches, forward=forward, outputs="values")
    assert torch.allclose(found.mean, means.mean(0), atol=1e-6)
    assert torch.allclose(found.within, variances.mean(0), atol=1e-6)
    assert torch.allclose(found.between, means.var(0, correction=0), atol=1e-6)
    assert torch.allclose(found.variance, found.within + found.between)
    only = polyak.predict(models, batches, forward=lambda m, b: forward(m, b)[0], outputs="values")
    assert torch.equal(only.between, found.between)
    assert float(only.within.abs().max()) == 0


def test_other_batches_for_the_second_member_are_refused():
    models, x = [net(0), net(1)], inputs()
    with pytest.raises(ArgumentError, match="shuffle=False"):
        polyak.predict(models, loader(shuffle=True))
    one_batch = DataLoader(x, batch_size=24, shuffle=True)  # the same values in another order
    with pytest.raises(ArgumentError, match="Batch 1 is not what it was"):
        polyak.predict(models, one_batch)

    class Shrinks(list):
        def __iter__(self):
            yield from list(self)[: max(1, len(self))]
            self.pop()

    def shorter():
        class Once:
            n = 3

            def __iter__(self):
                self.n -= 1
                return iter([x[:10], x[10:]][: self.n])

        return Once()

    with pytest.raises(ArgumentError, match="Batch 2 is not"):
        polyak.predict(models, shorter())
    assert polyak.predict(models[0], loader(shuffle=True)).members == 1


class Nan(nn.Module):
    def forward(self, x):
        return x * math.nan


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("members", "batches", "options", "match"),
    [
        ([], [X], {}, "no members"),
        (3, [X], {}, "A member is a int"),
        ([None], [X], {}, "A member is a NoneType"),
        (nn.Identity(), [], {}, "no batches"),
        (nn.Identity(), 3, {}, "batches"),
        ([nn.Identity()] * 2, iter([X]), {}, "iterator"),
        (nn.Identity(), [X], {"draws": 0}, "draws"),
        (nn.Identity(), [X], {"outputs": "classes"}, "outputs"),
        (nn.Identity(), [X], {"forward": 3}, "forward"),
        (nn.Identity(), [X[:, :1]], {}, r"shape \(2, 1\)"),
        (nn.Identity(), [X[0]], {}, r"shape \(3,\)"),
        (nn.Identity(), [X.long()], {}, "torch.int64"),
        (nn.Identity(), [X], {"outputs": "probabilities"}, "not probabilities"),
        (nn.Identity(), [-X], {"outputs": "probabilities"}, "not probabilities"),
        (nn.Identity(), [X], {"outputs": "values", "forward": lambda m, x: (x, -x)}, "negative"),
        (nn.Identity(), [X], {"outputs": "values", "forward": lambda m, x: (x, x[:1])}, "shape"),
        ([nn.Identity(), nn.Linear(3, 2)], [X], {}, "same outputs"),
        ("no-such-file.pt", [X], {}, "pass model="),
        ({"weight": X}, [X], {}, "pass model="),
    ],
)
def test_what_is_refused(members, batches, options, match):
    with pytest.raises(ArgumentError, match=match):
        polyak.predict(members, batches, **options)


def test_members_that_do_not_fit_are_named(saved, tmp_path):
    files, _ = saved
    with pytest.raises(MismatchError, match=r"3\.weight"):
        polyak.predict(files, loader(), model=nn.Sequential(*net()[:3]))
    larger = nn.Sequential(*net(), nn.Linear(4, 4))
    with pytest.raises(MismatchError, match=r"4\.weight"):
        polyak.predict(files, loader(), model=larger)
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for path in (tmp_path / "none.pt", tmp_path / "torn.safetensors"):
        with pytest.raises(PolyakError, match=path.name):
            polyak.predict(path, loader(), model=net())


def test_members_that_have_diverged_or_are_empty():
    with pytest.raises(NonFiniteError, match="diverged"):
        polyak.predict(Nan(), [X])
    with pytest.raises(UsageError, match="empty"):
        polyak.predict(polyak.Average(net(), polyak.SWA()), [X])
    model = net()
    average = polyak.Average(model, polyak.SWA())
    average.update()
    average.update_bn([inputs()])
    with average.applied(), pytest.raises(UsageError):
        polyak.predict(model.state_dict(), [X], model=model)
    before = values(model)
    with pytest.raises(ZeroDivisionError):
        polyak.predict(average, [X], forward=lambda model, batch: 1 / 0)
    assert same(values(model), before)
    assert model.training
