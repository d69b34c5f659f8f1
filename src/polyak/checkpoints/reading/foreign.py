"""Files that are not read, by their first bytes or the names in their archive: what they are, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from polyak.checkpoints.reading.stored import ByteFile
from polyak.errors import FormatError

_KERAS = (
    "load the model in Keras, and write its weights with "
    "np.savez(path, **{w.path: w.numpy() for w in model.weights})"
)
_CONVERTED = "average the checkpoints that it was made from, and convert the average"
_UNPACK = "unpack it, and name the weights in it"

_MARKS: dict[tuple[int, bytes], tuple[str, str]] = {
    (0, b"\x89HDF"): ("an HDF5 file (Keras)", _KERAS),
    (0, b"GGUF"): ("a GGUF file (llama.cpp), whose weights are quantised in blocks", _CONVERTED),
    (0, b"version https://git-lfs"): ("a git-lfs pointer, not the weights", "run `git lfs pull`"),
    (0, b"<"): ("a web page or XML, perhaps a failed download", "fetch it again"),
    (0, b"\x1f\x8b"): ("compressed with gzip (a .tar.gz, or a .nemo file)", _UNPACK),
    (0, b"(\xb5/\xfd"): ("compressed with zstd", _UNPACK),
    (0, b"\xfd7zXZ"): ("compressed with xz", _UNPACK),
    (0, b"BZh"): ("compressed with bzip2", _UNPACK),
    (0, b"\x93NUMPY"): ("a single array (np.save)", "write arrays with np.savez"),
    (4, b"TFL3"): ("a model of TensorFlow Lite", _CONVERTED),
    (4, b"PTMF"): ("a flatbuffer of PyTorch for phones", _CONVERTED),
    (4, b"ET12"): ("a program of ExecuTorch", _CONVERTED),
}
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")
"""The version of the format, then any other field of its message."""

_SCRIPT = (
    "a TorchScript archive (torch.jit.save)",
    "if you trust it, torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')",
)
_EXPORT = (
    "a program of torch.export",
    "if you trust it, torch.save(torch.export.load(path).state_dict, 'weights.pt')",
)
_PACKAGE = (
    "a torch.package",
    "if you trust it, load the model with torch.package.PackageImporter, and torch.save its state_dict()",
)
# What a name in the archive ends with -> what the archive is, and how to get at the weights by running it.
_ARCHIVES = {
    "constants.pkl": _SCRIPT,
    "archive_format": _EXPORT,
    "serialized_exported_program.json": _EXPORT,
    ".data/extern_modules": _PACKAGE,
    ".data/python_version": _PACKAGE,
    "model.weights.h5": ("a model of Keras", _KERAS),
}
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", ".distcp")


def refuse_archive(file: ByteFile, names: Iterable[str]) -> None:
    """Raise FormatError for zip archives of other programs."""
    names = list(names)
    for end, (what, advice) in _ARCHIVES.items():
        if any(name == end or name.endswith(f"/{end}") for name in names):
            raise _refusal(file, what, advice)
    if names and not any(name.endswith((".npy", "data.pkl")) for name in names):
        raise FormatError(_not_ours(file, "zip", names))


def refuse_tar(file: ByteFile, names: Iterable[str]) -> None:
    """Raise FormatError for a tar archive that torch did not write."""
    raise FormatError(_not_ours(file, "tar", list(names)))


def _not_ours(file: ByteFile, kind: str, names: list[str]) -> str:
    held = [name for name in names if name.endswith(_WEIGHTS)]
    shown = ", ".join((held or names)[:5]) or "nothing"
    found = f"{file.path} is a {kind} archive that torch.save or np.savez did not write"
    if held:
        nemo = " (a .nemo file)" if any("model_weights" in name for name in held) else ""
        return f"{found}{nemo}; it holds {shown}. Unpack it, and name the weights in it."
    return f"{found}; it holds {shown}. Expected safetensors, torch.save or npz."


def refuse_foreign(file: ByteFile, start: bytes) -> None:
    """Raise FormatError, with advice, for formats that are recognised but not supported.

    start: the first 512 bytes, or all there are.
    """
    if not start:
        raise FormatError(f"{file.path} is empty. Copy it again.")
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":
        raise FormatError(
            f"{file.path} is a bare pickle, which cannot be read without running it. "
            "Load it where it was written, and torch.save a dict of its tensors."
        )
    for (place, mark), (what, advice) in _MARKS.items():
        if start[place:].startswith(mark):
            raise _refusal(file, what, advice)
    if _ONNX.match(start):
        raise _refusal(file, "an ONNX model", _CONVERTED)
    if _is_text(start):
        raise FormatError(
            f"{file.path} is text (it begins with {start[:30].decode('utf-8', 'replace')!r}), not a "
            "checkpoint. Name the file that holds the weights."
        )
    if len(start) > 8 and start[5:8] != b"\0\0\0":  # not the length of a safetensors header
        raise FormatError(
            f"{file.path} is of no format that polyak knows; it begins with {start[:12]!r}. Expected "
            "safetensors, torch.save or npz. If it should be one of these, copy it again."
        )


def _refusal(file: ByteFile, what: str, advice: str) -> FormatError:
    return FormatError(f"{file.path} is {what}: {advice}. Expected safetensors, torch.save or npz.")


def _is_text(start: bytes) -> bool:
    """Whether it is UTF-8 without control characters; a character may be cut at the end."""
    text = start.decode("utf-8", "replace").rstrip("\ufffd")
    return len(start) > 8 and all(char.isprintable() or char in "\n\r\t" for char in text)
