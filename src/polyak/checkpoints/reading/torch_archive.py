"""Torch archives (`torch.save`): a zip with a pickle of names and shapes, and the storages."""

from __future__ import annotations

from polyak.checkpoints.reading.pickle_machine import MAX_PICKLE_BYTES
from polyak.checkpoints.reading.pickle_reader import read_pickle
from polyak.checkpoints.reading.pickled_tensors import StorageRef, call_torch, persistent_storage
from polyak.checkpoints.reading.stored import ByteFile, Span, bytes_of
from polyak.checkpoints.reading.torch_file import TorchFile
from polyak.checkpoints.reading.zips import ZipArchive
from polyak.errors import FormatError


class TorchArchive(TorchFile):
    """A torch archive: its root object, and tensors of it as stored tensors."""

    def __init__(self, file: ByteFile, archive: ZipArchive | None = None) -> None:
        super().__init__(file)
        self.zip = archive or ZipArchive(file)
        self.prefix = self._find_prefix()
        where = f"{file.path}, {self.prefix}data.pkl"
        data = self.zip.read(f"{self.prefix}data.pkl", MAX_PICKLE_BYTES)
        self.root = read_pickle(data, where, call_torch, persistent_storage)
        self.swapped = self._is_big_endian()
        self._spans: dict[str, Span] = {}

    def storage(self, ref: StorageRef) -> Span:
        """The entry of a storage, of the length that its count says."""
        if ref.key not in self._spans:
            self._spans[ref.key] = self.zip.span(f"{self.prefix}data/{ref.key}")
        span = self._spans[ref.key]
        if bytes_of(ref.dtype, (ref.count,)) != span.length:
            raise FormatError(
                f"It is in a storage of {ref.count} {ref.dtype}, but {span.length} bytes are "
                "stored. The file is damaged."
            )
        return span

    def _find_prefix(self) -> str:
        found = [
            name for name in self.zip.entries if name.endswith("data.pkl") and name.count("/") <= 1
        ]
        if len(found) != 1:
            raise FormatError(
                f"{self.file.path} is a zip archive, but torch.save did not write it: "
                f"it has {len(found)} entries data.pkl, expected one."
            )
        return found[0].removesuffix("data.pkl")

    def _is_big_endian(self) -> bool:
        name = f"{self.prefix}byteorder"
        order = self.zip.read(name, 16) if name in self.zip.entries else b"little"
        if order not in (b"little", b"big"):
            raise FormatError(
                f"{self.file.path}: the byte order {order!r} is neither little nor big."
            )
        return order == b"big"
