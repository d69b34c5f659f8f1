"""Local files: threads, descriptors, and files that change under the reader."""

import os
import threading
import time
import tracemalloc

import pytest
import torch
from reference.stored import assert_reads, read_all
from safetensors.torch import save_file

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import storage
from polyak.checkpoints.reading.stored import ByteFile, Span, read_spans
from polyak.errors import ArgumentError, FormatError


@pytest.fixture
def file(tmp_path):
    save_file({"w": torch.arange(1000.0)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_what_is_not_there_or_not_a_file(tmp_path):
    with pytest.raises(ArgumentError, match="no file or folder"):
        open_checkpoint(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ArgumentError, FormatError)):
        open_checkpoint(tmp_path / "loop")
    for name in ("with\0nul", "x" * 5000, "loop/x", "pipe/x"):
        with pytest.raises((ArgumentError, FormatError)):
            open_checkpoint(f"{tmp_path}/{name}")


def test_what_the_system_refuses_is_one_of_our_errors(file, monkeypatch):
    """Simulated, since root may read everything."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    checkpoint = open_checkpoint(file)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(FormatError, match=r"Could not read .*: Permission denied"):
        read_all(checkpoint.tensors["w"])
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FormatError, match=r"Could not open .*: Permission denied"):
        open_checkpoint(file)


def test_a_file_that_changes_is_an_error(file):
    checkpoint = open_checkpoint(file)
    checkpoint.check_unchanged()
    os.utime(file, ns=(1, 1))
    with pytest.raises(FormatError, match="was changed or replaced"):
        checkpoint.check_unchanged()


def test_a_file_that_is_replaced_or_removed_is_an_error(file):
    for act in (lambda: file.write_bytes(file.read_bytes()), file.unlink):
        checkpoint = open_checkpoint(file)
        time.sleep(0.01)
        act()
        with pytest.raises(FormatError, match="was changed or replaced"):
            checkpoint.check_unchanged()


def test_a_file_that_shrinks_is_an_error(file):
    checkpoint = open_checkpoint(file)
    os.truncate(file, 500)
    with pytest.raises(FormatError, match="ends at byte 500"):
        read_all(checkpoint.tensors["w"])


def test_reading_after_close_is_an_error(file):
    with open_checkpoint(file) as checkpoint:
        stored = checkpoint.tensors["w"]
    with pytest.raises(FormatError, match="was closed"):
        read_all(stored)


def test_short_reads_are_continued(file, monkeypatch):
    """Linux reads at most 0x7ffff000 bytes a call, network file systems fewer."""
    whole = os.preadv

    def short(descriptor, buffers, offset):
        return whole(descriptor, [buffers[0][:7]], offset)

    expected = torch.arange(1000.0)
    checkpoint = open_checkpoint(file)
    monkeypatch.setattr(os, "preadv", short)
    assert_reads(checkpoint, {"w": expected})


def test_few_descriptors_serve_many_files(tmp_path, monkeypatch):
    pool = storage.DescriptorPool(4)
    monkeypatch.setattr(storage, "_POOL", pool)
    opened = []
    for number in range(20):
        save_file({"w": torch.full((9,), float(number))}, tmp_path / f"{number}.safetensors")
        opened.append(open_checkpoint(tmp_path / f"{number}.safetensors"))
    for _ in range(2):
        for number, checkpoint in enumerate(opened):
            assert_reads(checkpoint, {"w": torch.full((9,), float(number))})
    assert len(pool._open) <= 4
    os.utime(tmp_path / "0.safetensors", ns=(1, 1))
    with pytest.raises(FormatError, match="was changed or replaced"):
        read_all(opened[0].tensors["w"])  # opened again, and no longer the same
    for checkpoint in opened:
        checkpoint.close()
    assert not pool._open


def test_many_threads_on_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_POOL", storage.DescriptorPool(2))
    states = [{"w": torch.full((5000,), float(number))} for number in range(6)]
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
    opened = [open_checkpoint(tmp_path / f"{number}.safetensors") for number in range(6)]
    errors = []

    def work():
        try:
            for _ in range(30):
                for checkpoint, state in zip(opened, states, strict=True):
                    assert_reads(checkpoint, state, piece=4096)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_spans_are_read_across_their_borders():
    class Bytes(ByteFile):
        def __init__(self, data):
            self.path, self.data, self.size = "memory", data, len(data)

        def read_into(self, offset, buffer):
            buffer[:] = self.data[offset : offset + len(buffer)]

        def check_unchanged(self):
            pass

        def close(self):
            pass

    file = Bytes(bytes(range(100)))
    spans = (Span(file, 10, 3), Span(file, 50, 0), Span(file, 60, 5), Span(file, 0, 2))
    expected = bytes([10, 11, 12, 60, 61, 62, 63, 64, 0, 1])
    for piece in (1, 2, 3, 4, 7, 10):
        for start in range(11 - piece):
            buffer = bytearray(piece)
            read_spans(spans, start, memoryview(buffer))
            assert buffer == expected[start : start + piece]


def test_a_file_costs_no_memory_for_what_is_not_read(tmp_path):
    """32 MB of holes: opening reads the header only, and a read what it was asked for."""
    header = b'{"w":{"dtype":"F32","shape":[8000000],"data_offsets":[0,32000000]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 32_000_000)
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            stored = checkpoint.tensors["w"]
            stored.read_into(stored.nbytes - 16, memoryview(bytearray(16)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
