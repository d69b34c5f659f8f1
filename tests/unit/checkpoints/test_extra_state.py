"""State that is no tensor: kept from the newest in torch files, named where a file cannot hold it."""

import argparse
import collections
import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from reference.stored import assert_reads
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak import average_checkpoints
from polyak.checkpoints import diff_checkpoints, inspect_checkpoint, open_checkpoint
from polyak.checkpoints.reading.extra_state import TensorAt
from polyak.cli.app import run
from polyak.errors import FormatError, PolyakWarning


class Scaled(nn.Linear):
    """A layer with state beside its weights, as those of TransformerEngine have."""

    def __init__(self, state=None):
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def everything(n):
    return {
        "amax": torch.full((2, n), float(n)),
        "history": [torch.arange(n), (n, None, 2.5, True)],
        "names": {"b", "a"},
        "raw": b"\xff\0" * n,
        "dtype": torch.float8_e4m3fn,
        "device": torch.device("cpu"),
        "order": collections.OrderedDict(z=1, a=n),
        7: "seven",
    }


STATES = {
    "a dict of everything": everything,
    "a number": lambda n: n,
    "text": lambda n: "x" * n,
    "bytes": lambda n: bytes(range(n)),
    "a tensor": lambda n: torch.full((n,), float(n)),
    "integers": lambda n: torch.arange(n),
    "a list of tensors": lambda n: [torch.ones(n), torch.full((1,), 2.0 * n)],
    "nothing": lambda n: None,
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        if type(a) is not type(b) or len(a) != len(b):
            return False
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b, strict=True)
        return all(equal(x, y) for x, y in pairs) and (
            not isinstance(a, dict) or list(a) == list(b)
        )
    return type(a) is type(b) and a == b


def model_of(state):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 2), Scaled(state))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_a_merge_keeps_the_newest(tmp_path, kind, legacy):
    """Whatever it is, and however its tensors differ in shape from the older ones'."""
    for n in (3, 4):
        model = model_of(STATES[kind](n))
        with torch.no_grad():
            model[1].weight.fill_(n)
        path = tmp_path / f"step-{n}.pt"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    average_checkpoints(tmp_path.glob("step-*.pt"), tmp_path / "out.pt")
    fresh = model_of(STATES[kind](1))
    fresh.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert equal(fresh[1].state, STATES[kind](4))
    assert fresh[1].weight.unique().tolist() == [3.5]


@pytest.mark.parametrize("layout", ["model", "averaged_model"])
@pytest.mark.parametrize("kind", STATES)
def test_an_average_saves_the_models(tmp_path, kind, layout):
    model = model_of(STATES[kind](3))
    average = polyak.Average(model, polyak.SWA())
    average.update()
    model[1].state = STATES[kind](4)
    average.save(tmp_path / "x.pt", layout=layout)
    fresh = model_of(STATES[kind](1))
    holder = fresh if layout == "model" else torch.optim.swa_utils.AveragedModel(fresh)
    holder.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    inner = fresh if layout == "model" else holder.module
    assert equal(inner[1].state, STATES[kind](4))
    again = polyak.Average(model_of(None), polyak.SWA())
    if layout == "model":
        again.load(tmp_path / "x.pt")
        assert again.count == 1


def test_a_stream_in_memory(tmp_path):
    stream = io.BytesIO(b"hello")
    stream.seek(2)
    torch.save(model_of(stream).state_dict(), tmp_path / "x.pt")
    average_checkpoints([tmp_path / "x.pt"], tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=False)["1._extra_state"]
    assert (found.tell(), found.getvalue()) == (2, b"hello")


def test_a_safetensors_file_cannot_hold_it(tmp_path, capsys):
    average = polyak.Average(model_of({"n": 3, "t": torch.ones(1)}), polyak.SWA())
    average.update()
    expected = r"x\.safetensors holds tensors only.* 1\._extra_state \(dict\)\. Write a torch file"
    with pytest.warns(PolyakWarning, match=expected):
        average.save(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }
    torch.save(model_of([1]).state_dict(), tmp_path / "a.pt")
    with pytest.warns(PolyakWarning, match=r"1\._extra_state \(list\)"):
        average_checkpoints([tmp_path / "a.pt"], tmp_path / "y.safetensors")
    with pytest.warns(PolyakWarning, match=r"folder holds tensors only"):
        average_checkpoints([tmp_path / "a.pt"], tmp_path / "folder")
    assert run(["average", str(tmp_path / "a.pt"), "-o", str(tmp_path / "z.safetensors")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "is without state that is no tensor: 1._extra_state (list)" in shown


def test_an_object_is_left_out_with_a_warning(tmp_path):
    model = model_of({"settings": argparse.Namespace(rate=0.1)})
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert inspect_checkpoint(tmp_path / "x.pt").extra == {"1._extra_state": "dict"}
    with pytest.warns(
        PolyakWarning, match=r"1\._extra_state \(argparse\.Namespace\)\. Load it with"
    ):
        average_checkpoints([tmp_path / "x.pt"], tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(written) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_an_object_with_a_tensor_is_refused(tmp_path):
    model = model_of(argparse.Namespace(weights=nn.Linear(2, 2)))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt", strict=False)
    assert "1._extra_state" in opened.extra or "1._extra_state" in opened.refused
    torch.save(model_of(torch.eye(2).to_sparse()).state_dict(), tmp_path / "y.pt")
    with pytest.raises(FormatError, match=r"1\._extra_state: It is sparse"):
        open_checkpoint(tmp_path / "y.pt")


def test_values_that_a_module_keeps_among_its_tensors(tmp_path):
    """What `_save_to_state_dict` adds is state as well; what a loop adds to a plain dict is not."""
    state = model_of(None).state_dict()
    state["0.bits"], state["0.table"] = 4, {"a": [1, 2]}
    torch.save(state, tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    assert opened.extra == {"0.bits": 4, "0.table": {"a": [1, 2]}, "1._extra_state": None}
    average_checkpoints([tmp_path / "x.pt"], tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["0.table"] == {"a": [1, 2]}
    torch.save({"w": torch.ones(1), "epoch": 3, "args": argparse.Namespace()}, tmp_path / "y.pt")
    assert open_checkpoint(tmp_path / "y.pt").extra == {}


def test_what_is_read(tmp_path):
    extra = {"t": torch.ones(2), "again": None}
    extra["again"] = extra["t"]
    torch.save({"model": model_of(extra).state_dict()}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as opened:
        inside = {"1._extra_state.t": torch.ones(2), "1._extra_state.again": torch.ones(2)}
        weights = model_of(None).state_dict()
        del weights["1._extra_state"]
        assert_reads(opened, {**weights, **inside})
        assert opened.extra["1._extra_state"] == {
            "t": TensorAt("1._extra_state.t"),
            "again": TensorAt("1._extra_state.again"),
        }
        assert opened.ties == {}


def test_differences(tmp_path, capsys):
    for name, state in (("a", {"n": 1, "x": float("nan")}), ("b", {"n": 2, "x": float("nan")})):
        torch.save(model_of(state).state_dict(), tmp_path / f"{name}.pt")
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "c.pt")
    torch.save(model_of(torch.ones(2)).state_dict(), tmp_path / "d.pt")
    a, b, c, d = (tmp_path / f"{name}.pt" for name in "abcd")
    assert diff_checkpoints(a, a).same
    assert diff_checkpoints(a, b).extra == ("1._extra_state",)
    assert run(["diff", str(a), str(b)]) == 1
    assert "1._extra_state: state that is no tensor differs" in capsys.readouterr().out
    assert diff_checkpoints(a, c).only_a == ("1._extra_state",)
    assert diff_checkpoints(a, d).extra == ("1._extra_state",)
    assert run(["inspect", str(a)]) == 0
    assert "1._extra_state is state that is no tensor (dict)" in capsys.readouterr().out


def test_statistics_are_updated_beside_it(tmp_path):
    def build():
        return nn.Sequential(Scaled([{"a", "b"}, 3]), nn.BatchNorm1d(2))

    torch.save(build().state_dict(), tmp_path / "x.pt")
    model = build()
    model[0].state = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polyak.batchnorm.update_bn_file(tmp_path / "x.pt", model, [torch.randn(8, 2)])
    assert model[0].state == [{"a", "b"}, 3]
    build().load_state_dict(torch.load(tmp_path / "x.pt"))


def test_equal_contents_give_equal_bytes(tmp_path):
    """Sets too, whose order differs between processes."""
    torch.save(model_of(everything(3)).state_dict(), tmp_path / "x.pt")
    code = "import sys, polyak; polyak.average_checkpoints([sys.argv[1]], sys.argv[2])"
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, tmp_path / "x.pt", tmp_path / f"{seed}.pt"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert (tmp_path / "1.pt").read_bytes() == (tmp_path / "2.pt").read_bytes()


def test_it_keeps_its_place_among_the_tensors(tmp_path):
    model = nn.Sequential(Scaled([torch.ones(1), "x"]), nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    average_checkpoints([tmp_path / "x.pt"], tmp_path / "out.pt")
    assert list(torch.load(tmp_path / "out.pt")) == list(model.state_dict())


def test_shards_of_a_folder_hold_it_too(tmp_path):
    """Listed in the index or not, and with tensors inside, which the index does not list."""
    first, second = {"0.weight": torch.ones(2)}, {"1.weight": torch.zeros(2)}
    second["1._extra_state"] = {"amax": torch.ones(3), "n": 2}
    for number, state in enumerate((first, second), 1):
        torch.save(state, tmp_path / f"pytorch_model-{number:05}-of-00002.bin")
    for listed in ({}, {"1._extra_state": 2}):
        numbers = {"0.weight": 1, "1.weight": 2, **listed}
        weight_map = {n: f"pytorch_model-{i:05}-of-00002.bin" for n, i in numbers.items()}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with open_checkpoint(tmp_path) as opened:
            inside = {"amax": TensorAt("1._extra_state.amax"), "n": 2}
            assert opened.extra == {"1._extra_state": inside}
        average_checkpoints([tmp_path], tmp_path / "out.pt", overwrite=True)
        found = torch.load(tmp_path / "out.pt", weights_only=True)["1._extra_state"]
        assert equal(found, second["1._extra_state"])


def test_several_models_of_a_folder_hold_it_too(tmp_path):
    """As accelerate writes them: the tensors inside follow the names of their model."""
    (tmp_path / "random_states_0.pkl").write_bytes(b"x")
    for name, n in (("pytorch_model.bin", 1), ("pytorch_model_1.bin", 2)):
        torch.save(model_of({"t": torch.ones(n)}).state_dict(), tmp_path / name)
    with open_checkpoint(tmp_path) as opened:
        assert opened.extra == {
            "1._extra_state": {"t": TensorAt("1._extra_state.t")},
            "model_1/1._extra_state": {"t": TensorAt("model_1/1._extra_state.t")},
        }
        names = [one["t"].name for one in opened.extra.values()]
        assert [opened.tensors[name].shape for name in names] == [(1,), (2,)]
