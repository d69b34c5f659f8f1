"""Coming from other libraries, and going to them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import swa_utils as torchs

import polyak.errors
from polyak import EMA, SWA, After, Average, Profile, Window, open_checkpoint


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
        model(torch.randn(8, 3))


def _go_on(average: Average, theirs: object, update: object, n: int = 5) -> None:
    """From here on the two must agree."""
    for _ in range(n):
        _step(average.model)
        average.update()
        update(theirs, average.model)


def _agree(average: Average, expected: dict[str, Tensor]) -> None:
    found = average.averaged_tensors()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("profile", "function"),
    [(SWA(), None), (EMA(decay=0.9, keep_initial=True), torchs.get_ema_multi_avg_fn(0.9))],
)
def test_from_torch_and_on_as_if_nothing_had_happened(
    profile: object, function: object, compiled: bool
) -> None:
    model = _model()
    averaged = torch.compile(model, backend="eager") if compiled else model
    theirs = torchs.AveragedModel(averaged, multi_avg_fn=function)
    for _ in range(4):
        _step(model)
        theirs.update_parameters(averaged)
    average = Average(model, profile)
    average.import_state(copy.deepcopy(theirs.state_dict()))
    assert average.count == 4
    inner = theirs.module._orig_mod if compiled else theirs.module
    _agree(average, inner.state_dict())
    _go_on(average, theirs, lambda a, _: a.update_parameters(averaged))
    _agree(average, dict(inner.named_parameters()))
    whole = Average(model, profile)
    assert average.metrics()["effective_samples"] > 0
    assert whole.count == 0


def _timm_v3(a: OrderedDict[str, Tensor], model: nn.Module, decay: float = 0.9) -> None:
    """What timm's ModelEmaV3 does without warm-up: everything in the state dict, by position."""
    for average, (_, tensor) in zip(a.values(), model.state_dict().items(), strict=True):
        if average.is_floating_point():
            average.lerp_(tensor, 1 - decay)
        else:
            average.copy_(tensor)


@pytest.mark.parametrize("in_a_checkpoint", [False, True])
def test_from_timm_which_does_not_count(in_a_checkpoint: bool) -> None:
    model = _model()
    state = OrderedDict((k, v.clone()) for k, v in model.state_dict().items())
    for _ in range(6):
        _step(model)
        _timm_v3(state, model)
    if in_a_checkpoint:
        foreign: dict[str, object] = {"epoch": 3, "state_dict_ema": dict(state), "arch": "net"}
    else:
        foreign = {f"module.{k}": v for k, v in state.items()}
    average = Average(model, EMA(decay=0.9, keep_initial=True))
    with pytest.raises(polyak.errors.ArgumentError, match="pass updates="):
        average.import_state(foreign)
    assert average.count == 0
    average.import_state(foreign, updates=7)
    assert (average.count, average.time) == (7, 6)
    _agree(average, state)
    _go_on(average, state, lambda a, model: _timm_v3(a, model))
    _agree(average, {n: state[n] for n, _ in model.named_parameters()})


@pytest.mark.parametrize("include_online_model", [False, True])
def test_from_ema_pytorch(include_online_model: bool) -> None:
    from ema_pytorch import EMA as TheirEMA

    model = _model()
    theirs = TheirEMA(
        model,
        beta=0.9,
        min_value=0.9,
        update_every=1,
        update_after_step=0,
        include_online_model=include_online_model,
    )
    for _ in range(4):
        _step(model)
        theirs.update()
    average = Average(model, EMA(decay=0.9, keep_initial=True))
    average.import_state(theirs.state_dict())
    assert average.count == 4
    _agree(average, dict(theirs.ema_model.named_parameters()))
    _go_on(average, theirs, lambda a, _: a.update())
    _agree(average, dict(theirs.ema_model.named_parameters()))


@pytest.mark.parametrize("loaded_from_file", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_from_a_checkpoint_of_lightning(tmp_path: Path, loaded_from_file: bool) -> None:
    """Its averaging layout: the average in `state_dict`, the count in `averaging_state`."""
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(40, 3))
    trainer = lightning.Trainer(
        max_steps=5,
        callbacks=[callbacks.EMAWeightAveraging(decay=0.9)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    module = Module()
    average = Average(module, EMA(decay=0.9, keep_initial=True))
    if loaded_from_file:
        average.load(path)
    else:
        average.import_state(checkpoint)
    assert average.count == int(checkpoint["averaging_state"]["n_averaged"]) == 5
    _agree(average, {n: checkpoint["state_dict"][n] for n, _ in module.named_parameters()})
    with open_checkpoint(path) as opened:
        assert opened.tensors["net.0.weight"].load().equal(checkpoint["state_dict"]["net.0.weight"])


def test_from_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    model = _model()
    theirs = EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
    for _ in range(4):
        _step(model)
        theirs.step(model.parameters())
    average = Average(model, EMA(decay=0.9, keep_initial=True))
    average.import_state(theirs.state_dict())
    assert average.count == 4
    _agree(average, dict(zip(dict(model.named_parameters()), theirs.shadow_params, strict=True)))
    _go_on(average, theirs, lambda a, model: a.step(model.parameters()))
    _agree(average, dict(zip(dict(model.named_parameters()), theirs.shadow_params, strict=True)))


@pytest.mark.parametrize("only_trained", [False, True])
def test_from_torch_ema_which_lists_what_it_was_given(only_trained: bool) -> None:
    from torch_ema import ExponentialMovingAverage

    model = _model()
    model[0].requires_grad_(False)
    given = [p for p in model.parameters() if p.requires_grad or not only_trained]
    theirs = ExponentialMovingAverage(given, decay=0.9, use_num_updates=True)
    theirs.update()
    average = Average(model, EMA(decay=0.9))
    average.import_state(theirs.state_dict())
    assert average.count == 1
    _agree(average, {"2.weight": theirs.shadow_params[-2]})
    average.import_state({**theirs.state_dict(), "num_updates": None}, updates=20)
    assert average.count == 20


def test_a_plain_state_dict_and_a_model_with_an_attribute_named_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    average = Average(model, SWA())
    average.import_state(model.state_dict(), updates=3)
    _agree(average, model.state_dict())
    average.import_state(torchs.AveragedModel(model).state_dict(), updates=3)
    _agree(average, model.state_dict())


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1, 2], polyak.errors.FormatError, "found list"),
        (
            {"a": 1},
            polyak.errors.FormatError,
            r"no tensors in this state.*found the entries \['a'\]",
        ),
        ({"n_averaged": torch.tensor(2)}, polyak.errors.FormatError, "no tensors in this state"),
        (
            {"0.weight": torch.zeros(4, 3), "head.weight": torch.zeros(1)},
            polyak.errors.MismatchError,
            r"missing \(5\): 0.bias, 1.bias, 1.weight, 2.bias, 2.weight\n.*head.weight",
        ),
        ({"shadow_params": [torch.zeros(1)]}, polyak.errors.MismatchError, "lists 1 parameters"),
        (
            {"shadow_params": [torch.zeros(1)] * 6},
            polyak.errors.MismatchError,
            r"0.weight: \(1,\), but this model's is \(4, 3\)",
        ),
        (
            {**_model().state_dict(), "0.weight": torch.zeros(4, 4)},
            polyak.errors.MismatchError,
            "0.weight",
        ),
        (
            {**_model().state_dict(), "0.weight": torch.full((4, 3), torch.nan)},
            polyak.errors.NonFiniteError,
            "0.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    state: object, error: type[Exception], message: str
) -> None:
    model = _model()
    average = Average(model, SWA())
    average.update()
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(error, match=message):
        average.import_state(state, updates=2)
    after = average.state_dict()
    assert after["count"] == 1
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor)


def test_a_window_cannot_come_from_a_running_average() -> None:
    with pytest.raises(polyak.errors.ArgumentError, match="streaming profile"):
        Average(_model(), Window(5)).import_state(_model().state_dict(), updates=2)
    with pytest.raises(polyak.errors.ArgumentError, match="updates is 0"):
        Average(_model(), SWA()).import_state(_model().state_dict(), updates=0)


def _averaged() -> Average:
    model = _model()
    average = Average(model, SWA())
    for _ in range(3):
        _step(model)
        average.update()
    average.update_bn([torch.randn(16, 3)])
    return average


def test_to_torchs_averaged_model_and_back(tmp_path: Path) -> None:
    average = _averaged()
    average.save(tmp_path / "torch.pt", layout="averaged_model")
    theirs = torchs.AveragedModel(_model(1))
    theirs.load_state_dict(torch.load(tmp_path / "torch.pt", weights_only=True))
    assert theirs.n_averaged == 3
    back = Average(_model(2), SWA())
    back.import_state(theirs.state_dict())
    _agree(back, average.averaged_tensors())


def test_to_a_plain_state_dict_and_to_safetensors(tmp_path: Path) -> None:
    average = _averaged()
    average.save(tmp_path / "plain.pt")
    average.save(tmp_path / "plain.safetensors")
    model = _model(1)
    for state in (
        torch.load(tmp_path / "plain.pt", weights_only=True),
        load_file(tmp_path / "plain.safetensors"),
    ):
        model.load_state_dict(state)
        _agree(average, model.state_dict())
    with pytest.raises(polyak.errors.OutputError, match="exists"):
        average.save(tmp_path / "plain.pt")
    average.save(tmp_path / "plain.pt", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"plain.pt", "plain.safetensors"}


def test_save_refuses(tmp_path: Path) -> None:
    average = _averaged()
    with pytest.raises(polyak.errors.ArgumentError, match="layout is 'onnx'"):
        average.save(tmp_path / "a.pt", layout="onnx")
    with pytest.raises(polyak.errors.ArgumentError, match=r"from \.pt files"):
        average.save(tmp_path / "a.safetensors", layout="averaged_model")
    with pytest.raises(polyak.errors.UsageError, match="nothing has been averaged"):
        Average(_model(), SWA()).save(tmp_path / "a.pt")
    with torch.no_grad():
        average.model[0].weight.fill_(torch.nan)
    average.update()
    with pytest.raises(polyak.errors.NonFiniteError, match=r"0\.weight"):
        average.save(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_stale_statistics_are_said(tmp_path: Path) -> None:
    average = _averaged()
    _step(average.model)
    average.update()
    with pytest.warns(polyak.errors.StaleStatistics):
        average.save(tmp_path / "a.pt")


class TestLoad:
    """`Average.load`: ours or another library's, from a file."""

    @pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.999), Window(length=3)])
    def test_a_state_of_ours_goes_on_bitwise(self, tmp_path: Path, profile: object) -> None:
        model = _model()
        average, again = Average(model, profile), Average(model, profile)
        for _ in range(5):
            _step(model)
            average.update()
        torch.save(average.state_dict(), tmp_path / "a.pt")
        again.load(tmp_path / "a.pt")
        for _ in range(5):
            _step(model)
            average.update()
            again.update()
        assert (again.time, again.count) == (10, 10)
        for name, tensor in average.averaged_tensors().items():
            assert torch.equal(again.averaged_tensors()[name], tensor)

    def test_torchs_average(self, tmp_path: Path) -> None:
        model = _model()
        theirs = torchs.AveragedModel(model)
        for _ in range(3):
            _step(model)
            theirs.update_parameters(model)
        torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
        average = Average(model, SWA())
        average.load(tmp_path / "theirs.pt")
        assert average.count == 3
        _go_on(average, theirs, torchs.AveragedModel.update_parameters)
        _agree(average, dict(theirs.module.named_parameters()))

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt"])
    @pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.9, keep_initial=True), After(2, SWA())])
    def test_it_reads_what_save_wrote(self, tmp_path: Path, profile: Profile, name: str) -> None:
        model = nn.Sequential(_model(), nn.Linear(2, 2))
        model[1].weight = model[0][2].weight = nn.Parameter(torch.ones(2, 2))
        model[0][0] = nn.Linear(3, 2)
        model[0][1] = nn.BatchNorm1d(2)
        average, again = Average(model, profile, unit="epochs"), Average(model, profile)
        for _ in range(5):
            _step(model)
            average.update(2)
        average.update_bn([torch.randn(16, 3)])
        average.save(tmp_path / name)
        again.load(tmp_path / name)
        assert (again.time, again.count, again.unit) == (average.time, average.count, "epochs")
        expected = average.state_dict()
        found = again.state_dict()
        assert found["sum_squared_shares"] == expected["sum_squared_shares"]
        assert found["fresh_layers"] == ["0.1"]
        for _ in range(3):
            _step(model)
            average.update(2)
            again.update(2)
        for key, tensor in average.averaged_tensors().items():
            assert torch.equal(again.averaged_tensors()[key], tensor)

    def test_a_torch_file_is_the_bare_state_dict(self, tmp_path: Path) -> None:
        average = _averaged()
        average.save(tmp_path / "a.pth")
        state = torch.load(tmp_path / "a.pth", weights_only=True)
        _model(1).load_state_dict(state)
        assert list(state) == list(average.model.state_dict())
        assert state._metadata["1"]["version"] == 2
        assert state._metadata["polyak"]["count"] == "3"
        assert open_checkpoint(tmp_path / "a.pth").metadata["profile"] == "swa"

    def test_values_that_were_rounded_are_said_to_be(self, tmp_path: Path) -> None:
        model = nn.Linear(3, 2).bfloat16()
        average = Average(model, SWA())
        average.update()
        average.save(tmp_path / "a.safetensors")
        again = Average(model, SWA())
        with pytest.warns(polyak.errors.PolyakWarning, match="bfloat16.*rounded") as caught:
            again.load(tmp_path / "a.safetensors")
        assert caught[0].filename == __file__
        assert again.count == 1
        assert again.state_dict()["tensors"]["weight"].dtype is torch.float32

    def test_what_save_wrote_of_another_average(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 1)
        average = Average(model, SWA())
        average.update()
        average.save(tmp_path / "a.safetensors")
        with pytest.raises(polyak.errors.MismatchError, match=r"'swa', and this one has 'ema:"):
            Average(model, EMA(decay=0.9)).load(tmp_path / "a.safetensors")
        with pytest.raises(polyak.errors.ArgumentError, match=r"use state_dict\(\)"):
            Average(model, Window(3)).load(tmp_path / "a.safetensors")
        with pytest.raises(polyak.errors.MismatchError, match="missing"):
            Average(_model(), SWA()).load(tmp_path / "a.safetensors")
        other = Average(model, EMA(decay=0.9))
        other.load(tmp_path / "a.safetensors", updates=7)
        assert other.count == 7
        assert torch.equal(other.averaged_tensors()["weight"], model.weight)

    @pytest.mark.parametrize("name", ["a", "a.npz", "a.bin.gz", "folder/"])
    def test_other_suffixes_are_refused_by_name(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(polyak.errors.ArgumentError, match=r"suffix .*expected \.safetensors"):
            _averaged().save(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_folder_is_called_one(self, tmp_path: Path) -> None:
        with pytest.raises(polyak.errors.ArgumentError, match="is a folder"):
            Average(nn.Linear(2, 1), SWA()).load(tmp_path)

    def test_what_cannot_be_read_changes_nothing(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 1)
        average = Average(model, SWA())
        average.update()
        path = tmp_path / "a.pt"
        torch.save(average.state_dict(), path)
        with pytest.raises(polyak.errors.ArgumentError, match="leave out updates="):
            average.load(path, updates=3)
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"no state at all"):
            for bad in (tmp_path / "bad.pt", tmp_path / "bad.safetensors"):
                bad.write_bytes(content)
                with pytest.raises(polyak.errors.FormatError, match=bad.name):
                    average.load(bad)
        torch.save(model, path)  # a pickled class: never run
        with pytest.raises(polyak.errors.FormatError, match="import_state"):
            average.load(path)
        with pytest.raises(polyak.errors.ArgumentError, match="no such file"):
            average.load(tmp_path / "none.pt")
        assert average.count == 1


@pytest.mark.parametrize(
    ("state", "updates", "message"),
    [
        ({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, 1.5, "whole number"),
        ({"shadow_params": None}, 3, "not a list of tensors"),
        ({"shadow_params": [1, 2]}, 3, "not a list of tensors"),
        ({"state_dict_ema": None}, 3, "reads a state dict"),
    ],
)
def test_states_in_pieces_are_refused_by_what_is_wrong(
    state: object, updates: object, message: str
) -> None:
    with pytest.raises((polyak.errors.ArgumentError, polyak.errors.FormatError), match=message):
        Average(nn.Linear(2, 1), SWA()).import_state(state, updates=updates)


@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.9, keep_initial=True), EMA(decay=0.999)])
def test_any_number_of_updates(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a million are added up in pieces, near enough and in bounded memory."""
    from polyak.averaging import interop

    state = nn.Linear(2, 1).state_dict()
    exact = Average(nn.Linear(2, 1), profile)
    exact.import_state(state, updates=20_000)
    monkeypatch.setattr(interop, "_EXACT", 1000)
    monkeypatch.setattr(interop, "_PIECES", 500)
    pieces = Average(nn.Linear(2, 1), profile)
    pieces.import_state(state, updates=20_000)
    found, expected = (a.metrics()["effective_samples"] for a in (pieces, exact))
    assert found == pytest.approx(expected, rel=0.01)
    pieces.import_state(state, updates=10**15)
    assert pieces.count == 10**15
    for updates in (True, "3", float("inf"), float("nan"), 2**60):
        with pytest.raises(polyak.errors.ArgumentError, match="updates is"):
            pieces.import_state(state, updates=updates)
