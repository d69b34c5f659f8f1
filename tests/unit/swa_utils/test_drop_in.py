"""The drop-in against torch's own module: same names, same signatures, same numbers, same states."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as torchs

import polyak.errors
from polyak import swa_utils as ours

SCRIPT = (Path(__file__).parent / "script.py.txt").read_text()


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _set(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_every_name_with_the_same_arguments() -> None:
    assert sorted(ours.__all__) == sorted(torchs.__all__)
    for name in torchs.__all__:
        mine, theirs = getattr(ours, name), getattr(torchs, name)
        assert list(inspect.signature(mine).parameters) == list(
            inspect.signature(theirs).parameters
        ), name


def _run(script: str) -> dict[str, object]:
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_script_written_against_torch_runs_with_only_the_import_changed() -> None:
    theirs = _run(SCRIPT)
    mine = _run(SCRIPT.replace("torch.optim.swa_utils", "polyak.swa_utils"))
    assert mine["keys"] == theirs["keys"]
    assert mine["n_averaged"] == theirs["n_averaged"]
    for name in ("rates", "buffers", "mean", "prediction"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for name, weights in theirs["weights"].items():
        assert mine["weights"][name] == pytest.approx(weights, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(("wrote", "reads"), [(ours, torchs), (torchs, ours)])
def test_states_load_both_ways_and_go_on(wrote: object, reads: object, use_buffers: bool) -> None:
    model = _model()
    a = wrote.AveragedModel(model, use_buffers=use_buffers)
    b = reads.AveragedModel(_model(1), use_buffers=use_buffers)
    for value in (1.0, 3.0):
        _set(model, value)
        a.update_parameters(model)
    b.load_state_dict(a.state_dict())
    _set(model, 8.0)
    a.update_parameters(model)
    b.update_parameters(model)
    assert b.n_averaged == 3
    for mine, theirs in zip(a.module.parameters(), b.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(mine, torch.full_like(mine, 4.0))


def test_a_compiled_models_keys_are_plain_and_torchs_are_read() -> None:
    model = torch.compile(_model(), backend="eager")
    mine, theirs = ours.AveragedModel(model), torchs.AveragedModel(model)
    assert "module._orig_mod.0.weight" in theirs.state_dict()
    assert "module.0.weight" in mine.state_dict()
    theirs.update_parameters(model)
    mine.load_state_dict(theirs.state_dict())
    mine.update_parameters(model)
    assert mine.n_averaged == 2
    assert mine(torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize("make", ["get_swa_multi_avg_fn", "get_ema_multi_avg_fn"])
@pytest.mark.parametrize("n", [2, torch.tensor(2)])
def test_list_functions_agree_with_torchs(make: str, n: int | Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    averages = [torch.randn(4, generator=generator), torch.randn(2, 2, dtype=torch.complex64)]
    currents = [torch.randn(4, generator=generator), torch.randn(2, 2, dtype=torch.complex64)]
    mine, theirs = ([a.clone() for a in averages] for _ in range(2))
    for i in range(2):  # torch's wants one dtype at a time
        getattr(torchs, make)()(theirs[i : i + 1], currents[i : i + 1], n)
    getattr(ours, make)()(mine, currents, n)
    torch.testing.assert_close(mine, theirs)


def test_functions_refuse_what_torch_refuses() -> None:
    for make in (ours.get_ema_avg_fn, ours.get_ema_multi_avg_fn):
        for decay in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="expected a number from 0 to 1"):
                make(decay)
    with pytest.raises(polyak.errors.ArgumentError, match="pass only one"):
        ours.AveragedModel(
            _model(), avg_fn=ours.get_swa_avg_fn(), multi_avg_fn=ours.get_swa_multi_avg_fn()
        )


def test_a_custom_list_function_gets_lists_of_one_dtype() -> None:
    model = nn.ParameterList([torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(1)])
    calls = []

    def newest(averages: list[Tensor], currents: list[Tensor], n: Tensor) -> None:
        calls.append((len(averages), averages[0].dtype, int(n)))
        torch._foreach_copy_(averages, currents)

    average = ours.AveragedModel(model, multi_avg_fn=newest)
    for value in (1.0, 2.0):
        _set(model, value)
        average.update_parameters(model)
    assert sorted(calls, key=str) == [(1, torch.float64, 1), (2, torch.float32, 1)]
    assert average.module[2].item() == 2.0


def test_swalr_is_one_of_torchs_and_its_states_load_both_ways() -> None:
    def optimizer() -> torch.optim.SGD:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    for wrote, reads in ((ours, torchs), (torchs, ours)):
        first, second = optimizer(), optimizer()
        a = wrote.SWALR(first, swa_lr=0.1, anneal_epochs=6)
        b = reads.SWALR(second, swa_lr=0.7, anneal_epochs=2)
        assert isinstance(a, torch.optim.lr_scheduler.LRScheduler)
        for _ in range(3):
            first.step()
            a.step()
        second.load_state_dict(first.state_dict())
        b.load_state_dict(a.state_dict())
        for _ in range(5):
            for o, s in ((first, a), (second, b)):
                o.step()
                s.step()
            assert b.get_last_lr() == pytest.approx(a.get_last_lr())
        assert b.get_last_lr() == pytest.approx([0.1])
