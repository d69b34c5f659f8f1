"""Files as torch wrote them before 1.6, made without it: tars of torch 0.1, and views of storages."""

import io
import pickle
import struct
import tarfile
from collections import OrderedDict

import torch

MAGIC = 0x1950A86A20F9469CFC6C


class Storage:
    """Pickles as a persistent id: the key of a storage, and the part of it that is meant."""

    def __init__(self, key, kind, count, part=None):
        self.identity = ("storage", kind, key, "cpu", count, part)


class View:
    """Pickles as torch before 0.4 (`_rebuild_tensor`) or after it pickled a tensor."""

    def __init__(self, storage, offset, shape, strides, *, old=False):
        self.args, self.old = (storage, offset, shape, strides), old

    def __reduce__(self):
        if self.old:
            return torch._utils._rebuild_tensor, self.args
        return torch._utils._rebuild_tensor_v2, (*self.args, False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return getattr(obj, "identity", None)


def pickled(value, protocol=2):
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def stream_of(value, storages, protocol=2):
    """A legacy file. storages: key -> (number of values, their bytes)."""
    data = b"".join(pickle.dumps(one, protocol) for one in (MAGIC, 1001, {"little_endian": True}))
    data += pickled(value, protocol) + pickle.dumps(list(storages), protocol)
    return data + b"".join(struct.pack("<q", n) + raw for n, raw in storages.values())


def object_of(storages, protocol=2):
    """The object of a legacy file alone, with views of each of the storages (key -> float32 values)."""
    kinds = {key: Storage(key, torch.FloatStorage, count) for key, count in storages.items()}
    state = OrderedDict(
        (f"{key}.weight", View(kinds[key], 0, (n,), (1,))) for key, n in storages.items()
    )
    first, count = next(iter(storages.items()))
    state["t"] = View(kinds[first], 0, (count // 2, 2), (1, count // 2), old=True)
    state["part"] = View(Storage(first, torch.FloatStorage, count, ("v", 1, 3)), 1, (2,), (1,))
    return pickled(
        {"state_dict": state, "epoch": 3, "best": 0.5, "args": ["x", (1, None)]}, protocol
    )


def tar_of(members):
    """A tar as Python's tarfile writes it for torch 0.1: with `x` records of the times."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1234567890.5
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


class Numbered:
    """Pickles as the persistent id of a tensor in a tar: its number, as text."""

    def __init__(self, number):
        self.identity = str(number)


def tar_members(tensors, views, root, protocol=2):
    """The members of a tar of torch 0.1.

    tensors: number -> (storage, offset, shape, strides), where a storage is its number. views: number of
    a storage -> (number of the whole, offset, count). root: the storages, number -> tensor, and the object.
    """
    wholes, value = root
    storages = pickle.dumps(len(wholes), protocol)
    for number, tensor in wholes.items():
        kind = getattr(torch, tensor.type().rpartition(".")[2].replace("Tensor", "Storage"))
        raw = tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        storages += pickle.dumps((number, "cpu", kind), protocol)
        storages += struct.pack("<q", tensor.numel()) + raw
    storages += pickle.dumps([(number, *view) for number, view in views.items()], protocol)
    described = pickle.dumps(len(tensors), protocol)
    for number, (storage, offset, shape, strides) in tensors.items():
        described += pickle.dumps((number, storage, torch.FloatTensor), protocol)
        described += struct.pack(f"<i4x{2 * len(shape) + 1}q", len(shape), *shape, *strides, offset)
    return {
        "sys_info": pickle.dumps({"protocol_version": 1000}, protocol),
        "pickle": pickled(value, protocol),
        "tensors": described,
        "storages": storages,
    }


def real_tar_members():
    """A small state dict in the members `storages`, `tensors`, `pickle`, in this order."""
    wholes = {101: torch.arange(12.0), 102: torch.arange(3), 103: torch.empty(0)}
    tensors = {
        1: (101, 0, (2, 3), (3, 1)),
        2: (101, 0, (3, 2), (1, 3)),
        3: (102, 0, (3,), (1,)),
        4: (201, 1, (2,), (1,)),
        5: (103, 0, (0,), (1,)),
    }
    names = ("a.weight", "a.turned", "counts", "part", "empty")
    state = OrderedDict(zip(names, map(Numbered, tensors), strict=True))
    root = (wholes, {"state_dict": state, "epoch": 3})
    members = tar_members(tensors, {201: (101, 6, 4)}, root)
    return {name: members[name] for name in ("storages", "tensors", "pickle")}
