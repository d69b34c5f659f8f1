"""What a reader must give, from the tensors themselves: row-major bytes, read in odd pieces."""

import torch

from polyak.checkpoints.reading.stored import Checkpoint, StoredTensor


def many_tensors():
    """Every dtype and layout: tensors of their own, views of one storage, ties and empty ones."""
    torch.manual_seed(1)
    base = torch.randn(7, 8)
    return {
        "plain": torch.randn(3, 4),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "bool": torch.tensor([True, False, True]),
        "int8": torch.tensor([-1, 2], dtype=torch.int8),
        "uint16": torch.tensor([1, 2], dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "float8": torch.randn(8).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "transposed": base.t(),
        "tied": base.t(),
        "row": base[2],
        "slice": base[1:, 1::3],
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
        "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "complex_transposed": torch.randn(4, 3, dtype=torch.complex128).t(),
    }


def row_major_bytes(tensor):
    """The bytes of a tensor in row-major order, through torch alone."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def read_all(stored: StoredTensor, piece: int = 0) -> bytes:
    """All bytes of a stored tensor, `piece` at a time (0: at once)."""
    buffer = bytearray(stored.nbytes)
    view = memoryview(buffer)
    step = piece or max(1, stored.nbytes)
    for start in range(0, stored.nbytes, step):
        stored.read_into(start, view[start : start + step])
    return bytes(buffer)


def assert_reads(checkpoint: Checkpoint, expected: dict, piece: int = 0):
    """Names (aliases of ties included), shapes and bytes are those of `expected`."""
    assert checkpoint.tensors.keys() | checkpoint.ties.keys() == expected.keys()
    for name, stored in checkpoint.tensors.items():
        tensor = expected[name]
        assert stored.shape == tuple(tensor.shape), name
        assert stored.nbytes == tensor.numel() * tensor.element_size(), name
        assert read_all(stored, piece) == row_major_bytes(tensor), name
    for alias, name in checkpoint.ties.items():
        assert torch.equal(expected[alias], expected[name]), alias
