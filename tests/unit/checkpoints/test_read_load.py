"""`StoredTensor.load()`: a stored tensor as a torch tensor, from every layout that is read."""

import pytest
import torch
from safetensors.torch import save_file

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading.stored import TORCH_DTYPES
from polyak.errors import FormatError


def values(dtype, shape):
    torch.manual_seed(0)
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(100, 150, shape, dtype=torch.uint8).view(dtype)
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, dtype=wide).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


def same(left, right):
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.is_contiguous()
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    assert torch.equal(*as_bytes)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_dtype_of_torch(tmp_path, dtype):
    state = {
        "m": values(dtype, (3, 4)),
        "t": values(dtype, (5, 2)).t(),  # stored transposed
        "n": values(dtype, (1,)).reshape(()),
        "e": torch.empty((0, 3), dtype=dtype),
    }
    torch.save(state, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        for name, tensor in state.items():
            same(checkpoint.tensors[name].load(), tensor)


def test_what_is_loaded_belongs_to_the_caller(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        first, second = (checkpoint.tensors["w"].load() for _ in range(2))
    first.zero_()
    assert second.tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_dcp(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    state = {"w": torch.randn(6, 5), "b": torch.arange(3)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in state.items():
            same(checkpoint.tensors[name].load(), tensor)


def test_a_dtype_that_torch_does_not_have(tmp_path):
    header = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(FormatError, match="w is stored as F6_E2M3, which torch does not have"),
    ):
        checkpoint.tensors["w"].load()
