"""Real checkpoints as bytes, a file in memory, and what may come of reading it."""

import io
import tempfile
import zipfile
from pathlib import Path

from reference.old_torch import real_tar_members, tar_of

from polyak.checkpoints.reading.dcp import read_dcp
from polyak.checkpoints.reading.opening import read_file
from polyak.checkpoints.reading.stored import ByteFile
from polyak.errors import PolyakError


class MemoryFile(ByteFile):
    """Bytes in memory, read as a file."""

    def __init__(self, data: bytes):
        self.path, self.data, self.size = "fuzz", data, len(data)

    def read_into(self, offset, buffer):
        assert 0 <= offset <= offset + len(buffer) <= self.size, "reads stay inside the file"
        buffer[:] = self.data[offset : offset + len(buffer)]

    def check_unchanged(self):
        pass

    def close(self):
        pass


def real_files() -> dict[str, bytes]:
    """Small files of every format, written by the libraries."""
    import numpy as np
    import torch
    from safetensors.torch import save

    state = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(2, dtype=torch.bfloat16),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "n": torch.tensor(3),
        "e": torch.empty(0, 2),
    }
    nested = {"model": {**state, "tied": state["a.weight"]}, "epoch": 3, "args": [1, (2.5, None)]}
    files = {"safetensors": save({name: t.contiguous() for name, t in state.items()}, {"k": "v"})}
    for name, value, protocol in (("torch", nested, 2), ("torch4", state, 4)):
        buffer = io.BytesIO()
        torch.save(value, buffer, pickle_protocol=protocol)
        files[name] = buffer.getvalue()
    for name, protocol in (("torch before 1.6", 2), ("torch before 1.6, protocol 1", 1)):
        buffer = io.BytesIO()
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
        torch.save(nested, buffer, **options)
        files[name] = buffer.getvalue()
    files["tar of torch 0.1"] = tar_of(real_tar_members()).rstrip(b"\0")
    buffer = io.BytesIO()
    np.savez(
        buffer, w=np.ones((2, 3), "f4"), f=np.asfortranarray(np.ones((2, 3))), b=np.ones(2, ">i2")
    )
    files["npz"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files["torch"])) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    files["torch through zipfile"] = buffer.getvalue()
    return files


def real_dcp() -> dict[str, bytes]:
    """The files of a small DCP folder."""
    import torch
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "step": 3}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class MemoryFolder:
    """Files in memory, as far as `read_dcp` needs a folder."""

    path = "fuzz"

    names = ()

    def __init__(self, files: dict[str, bytes], name: str = ""):
        self.files, self.name = files, name
        self.names = sorted(files)

    def inside(self, name):
        return MemoryFolder(self.files, name)

    def file(self):
        if self.name not in self.files:
            raise PolyakError("no such file")
        return MemoryFile(self.files[self.name])


def read_everything(data: bytes) -> bool:
    """Whether `data` reads as a checkpoint to its last byte; PolyakError is the only other outcome."""
    try:
        read_values(read_file(MemoryFile(data)), len(data))
    except PolyakError:
        return False
    return True


def read_dcp_everything(files: dict[str, bytes]) -> bool:
    """The same for a DCP folder."""
    try:
        read_values(read_dcp(MemoryFolder(files)), sum(map(len, files.values())))
    except PolyakError:
        return False
    return True


def read_values(checkpoint, limit):
    """Read every tensor, in two ways that must agree."""
    for stored in checkpoint.tensors.values():
        assert stored.nbytes <= limit, "no tensor is larger than the files that hold it"
        buffer = memoryview(bytearray(stored.nbytes))
        stored.read_into(0, buffer)
        half = stored.nbytes // 2
        again = memoryview(bytearray(stored.nbytes - half))
        stored.read_into(half, again)
        assert again == buffer[half:], "what is read does not depend on where reading begins"
