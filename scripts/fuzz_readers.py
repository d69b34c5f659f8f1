"""Fuzz the readers of checkpoints with atheris: every outcome must be a checkpoint or a PolyakError.

atheris does not support every version of Python, so it gets an environment of its own (with torch, which
the readers import); the corpus is made in the usual one:

    .venv/bin/python scripts/fuzz_readers.py make /tmp/corpus
    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris torch numpy safetensors
    /tmp/fuzz/bin/python scripts/fuzz_readers.py run legacy /tmp/corpus -runs=1000000 -max_len=8192

Each reader has a folder of the corpus, and is run alone:

    file         a whole file of any format
    archive      the pickle of a torch archive
    legacy       a torch file from before 1.6: whole, or its parts behind a whole preamble, or a tar
    dcp          the `.metadata` of a DCP folder
    safetensors  the header of a safetensors file
    npy          the header of an .npy array
"""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

STORAGES = {"a": 6, "b": 2}
"""Of the legacy files whose object is fuzzed: key -> number of float32 values."""


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_archive(data: bytes) -> bytes:
    return zipped({"x/data.pkl": data, "x/data/0": bytes(24), "x/data/1": bytes(4)})


def npz(header: bytes) -> bytes:
    short = header[:65535]
    return zipped(
        {"w.npy": b"\x93NUMPY\1\0" + len(short).to_bytes(2, "little") + short + bytes(24)}
    )


def headed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(76)


def preamble() -> bytes:
    values = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(value, 2) for value in values)


def legacy(data: bytes) -> bytes:
    """The first byte says how much of the file is the fuzzer's."""
    kind, rest = data[:1], data[1:]
    if kind == b"w":
        return rest
    if kind == b"t":
        return legacy_tar(rest)
    tail = pickle.dumps(list(STORAGES), 2)
    for count in STORAGES.values():
        tail += struct.pack("<q", count) + bytes(4 * count)
    return preamble() + rest + (b"" if kind == b"p" else tail)


def legacy_tar(data: bytes) -> bytes:
    """A tar of three members, which are separated by a mark, with right checksums."""
    from reference.old_torch import tar_of

    parts = data.split(b"|||", 2)
    members = dict(zip(("storages", "tensors", "pickle"), [*parts, b"", b""], strict=False))
    return tar_of(members)


def seeds() -> dict[str, list[bytes]]:
    """Real files, and the parts of them that are worth fuzzing alone."""
    from reference.mutated import real_dcp, real_files
    from reference.old_torch import object_of, real_tar_members

    files = real_files()
    pickles = []
    for name in ("torch", "torch4"):
        with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
            (entry,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
            pickles.append(archive.read(entry))
    length = int.from_bytes(files["safetensors"][:8], "little")
    old = [
        files["torch before 1.6"],
        files["torch before 1.6, protocol 1"],
        files["tar of torch 0.1"],
    ]
    objects = [object_of(STORAGES, protocol) for protocol in (1, 2, 4)]
    whole = [data[len(preamble()) :] for data in old[:1]]
    return {
        "file": list(files.values()),
        "archive": pickles,
        "legacy": [
            *(b"w" + data for data in old),
            *(b"p" + data for data in whole),
            *(b"o" + data for data in objects),
            b"t" + b"|||".join(real_tar_members().values()),
        ],
        "dcp": [real_dcp()[".metadata"]],
        "safetensors": [files["safetensors"][8 : 8 + length]],
        "npy": [b"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }"],
    }


def make(folder: Path) -> None:
    """Write the corpus, a folder for each reader."""
    from reference.mutated import real_dcp

    for reader, inputs in seeds().items():
        (folder / reader).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / reader / f"seed-{number}").write_bytes(data)
    (folder / "dcp.items").write_bytes(pickle.dumps(real_dcp()))


def reading(reader: str, folder: Path) -> Callable[[bytes], bool]:
    from reference.mutated import read_dcp_everything, read_everything

    if reader == "dcp":
        items = pickle.loads((folder / "dcp.items").read_bytes())  # written by `make`
        return lambda data: read_dcp_everything({**items, ".metadata": data})
    around = {"file": bytes, "archive": torch_archive, "legacy": legacy, "safetensors": headed}
    complete = around.get(reader, npz)
    return lambda data: read_everything(complete(data))


def run(reader: str, folder: Path, options: list[str]) -> None:
    """Fuzz one reader; the options are those of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["polyak"]):
        import polyak.checkpoints.reading.opening  # noqa: F401

    read = reading(reader, folder)

    def one(data: bytes) -> None:
        read(data)

    atheris.Setup([sys.argv[0], *options, str(folder / reader)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif len(sys.argv) > 3 and sys.argv[1] == "run":
        run(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(__doc__)
