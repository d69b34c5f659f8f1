"""Fuzz the readers of checkpoints with atheris: every outcome must be a checkpoint or a PolyakError.

atheris does not support every version of Python, so it gets an environment of its own (with torch, which
the readers import); the corpus is made in the usual one:

    .venv/bin/python scripts/fuzz_readers.py make /tmp/corpus
    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris torch
    /tmp/fuzz/bin/python scripts/fuzz_readers.py run /tmp/corpus -runs=1000000 -max_len=8192

The first byte of an input says what the rest is: a whole file, the pickle of a torch archive, the
`.metadata` of a DCP folder, the header of a safetensors file, or the header of an .npy array.
"""

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_archive(data: bytes) -> bytes:
    return zipped({"x/data.pkl": data, "x/data/0": bytes(24), "x/data/1": bytes(4)})


def make(folder: Path) -> None:
    """Write the corpus: real files, and the parts of them that are worth fuzzing alone."""
    from reference.mutated import real_dcp, real_files

    folder.mkdir(parents=True, exist_ok=True)
    seeds = [b"\0" + data for data in real_files().values()]
    for name in ("torch", "torch4"):
        with zipfile.ZipFile(io.BytesIO(real_files()[name])) as archive:
            (entry,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
            seeds.append(b"\1" + archive.read(entry))
    dcp = real_dcp()
    seeds.append(b"\2" + dcp[".metadata"])
    safetensors = real_files()["safetensors"]
    length = int.from_bytes(safetensors[:8], "little")
    seeds.append(b"\3" + safetensors[8 : 8 + length])
    seeds.append(b"\4{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }")
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    (folder.parent / f"{folder.name}.items").write_bytes(pickle.dumps(dcp))


def targets(items: dict[str, bytes]) -> list[Callable[[bytes], bool]]:
    from reference.mutated import read_dcp_everything, read_everything

    def npy(header: bytes) -> bytes:
        return (
            b"\x93NUMPY\1\0"
            + len(header[:65535]).to_bytes(2, "little")
            + header[:65535]
            + bytes(24)
        )

    return [
        read_everything,
        lambda data: read_everything(torch_archive(data)),
        lambda data: read_dcp_everything({**items, ".metadata": data}),
        lambda data: read_everything(len(data).to_bytes(8, "little") + data + bytes(76)),
        lambda data: read_everything(zipped({"w.npy": npy(data)})),
    ]


def run(folder: Path, options: list[str]) -> None:
    """Fuzz; the options are those of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["polyak"]):
        import polyak.checkpoints.reading.opening  # noqa: F401

    items = (folder.parent / f"{folder.name}.items").read_bytes()  # written by `make`
    readers = targets(pickle.loads(items))

    def one(data: bytes) -> None:
        if data:
            readers[data[0] % len(readers)](data[1:])

    atheris.Setup([sys.argv[0], *options, str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("make", "run"):
        sys.exit(__doc__)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]), sys.argv[3:])
