"""Tensors of subclasses in torch files: read if they are whole, or refused by name; none vanishes."""

import pytest
import torch
import torch.multiprocessing as mp
from reference.dtensor_save import build_model, save_dtensors
from reference.stored import assert_reads
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from polyak import average_checkpoints
from polyak.checkpoints import diff_checkpoints, inspect_checkpoint, open_checkpoint
from polyak.cli.app import run
from polyak.errors import FormatError


def two(value=1.0):
    return TwoTensor(torch.full((2, 3), value), torch.full((2, 3), value))


SUBCLASSES = {
    "a wrapper (as torchao's)": two,
    "a parameter that is a wrapper": lambda: nn.Parameter(two()),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "with memory of its own": lambda: torch.ones(2).as_subclass(Scaled),
    "a wrapper with a sparse inside": lambda: TwoTensor(torch.eye(2), torch.eye(2)),
}  # fmt: skip


class Scaled(torch.Tensor):
    """Values that may mean something else."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state, "epoch": 3}])
def test_none_vanishes(tmp_path, kind, wrap, legacy):
    state = {"a.weight": torch.ones(2), "b.weight": SUBCLASSES[kind]()}
    path = tmp_path / "x.pt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"1 of its tensors cannot be read.\n  b\.weight: It is "):
        open_checkpoint(path)
    found = inspect_checkpoint(path)
    assert [entry.name for entry in found.tensors] == ["a.weight"]
    assert list(found.refused) == ["b.weight"]
    with pytest.raises(FormatError, match=r"b\.weight in .*x\.pt: It is "):
        average_checkpoints([path], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_of_nothing_else_names_them(tmp_path):
    torch.save({"weight": two(), "bias": two()}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"bias: It is an object of .*TwoTensor"):
        open_checkpoint(tmp_path / "x.pt")
    torch.save(two(), tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"It is an object of .*TwoTensor"):
        open_checkpoint(tmp_path / "x.pt")


def test_two_different_models_are_not_equal(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"w": torch.ones(1), "q": two(value)}, tmp_path / f"{name}.pt")
    with pytest.raises(FormatError, match="q: It is an object"):
        diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
    assert run(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 2


@pytest.fixture(scope="module", params=[1, 2])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    mp.spawn(save_dtensors, (request.param, folder), request.param)
    return folder, request.param


def test_fsdp2_on_one_process_is_read_and_on_several_refused(saved):
    folder, world = saved
    path = folder / f"fsdp-{world}-0.pt"
    if world == 1:
        assert_reads(open_checkpoint(path), build_model().state_dict())
    else:
        with pytest.raises(FormatError, match=r"0\.weight: It is a DTensor.*\[2, 5\] of \[3, 5\]"):
            open_checkpoint(path)


def test_each_placement(saved):
    folder, world = saved
    opened = open_checkpoint(folder / f"placed-{world}-0.pt", strict=False)
    refused = {"partial"} if world == 1 else {"partial", "columns"}
    assert set(opened.refused) == refused
    whole = torch.arange(6.0).reshape(2, 3)
    expected = {"replicated": whole, "columns": whole, "one row": whole[:1]}
    assert_reads(opened, {k: v for k, v in expected.items() if k not in refused})


def test_a_tensor_of_a_device_without_storages(tmp_path):
    """XLA's are written as the host's tensor and the names of the dtype and the device."""

    class Elsewhere:
        def __init__(self, dtype):
            self.dtype = dtype

        def __reduce__(self):
            args = (torch.ones(2), self.dtype, "xla:0", False)
            return torch._utils._rebuild_device_tensor_from_cpu_tensor, args

    torch.save({"w": Elsewhere(torch.float32)}, tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"w": torch.ones(2)})
    torch.save({"w": Elsewhere(torch.float16)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="w: It is a tensor described"):
        open_checkpoint(tmp_path / "x.pt")


def test_one_storage_seen_as_two_dtypes_is_two_tensors(tmp_path):
    small = torch.ones(4).to(torch.float8_e4m3fn)
    state = {"a": small, "b": small.view(torch.float8_e5m2), "c": small}
    torch.save(state, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.ties == {"c": "a"}
        assert [t.dtype for t in checkpoint.tensors.values()] == ["F8_E4M3", "F8_E5M2"]
