"""What a reader must give, from the tensors themselves: row-major bytes, read in odd pieces."""

import torch

from polyak.checkpoints.reading.stored import Checkpoint, StoredTensor


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
