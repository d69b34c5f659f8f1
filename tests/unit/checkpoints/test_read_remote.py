"""Remote files by ranges: `memory://` stands for s3, gs and https."""

import http.server
import re
import threading

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference.stored import assert_reads
from safetensors.torch import save, save_file

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import storage
from polyak.errors import ArgumentError, FormatError


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True) if memory.ls("/") else None


def state():
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 500),
        "b": torch.arange(7),
        "t": torch.randn(20, 30).t().contiguous(),
    }


@pytest.mark.parametrize("piece", [0, 50_000])
@pytest.mark.parametrize("block", [1000, storage.BLOCK_BYTES])
def test_files(store, tmp_path, monkeypatch, piece, block):
    monkeypatch.setattr(storage, "BLOCK_BYTES", block)
    store.pipe("/run/step-5.safetensors", save(state()))
    torch.save({"model": state()}, tmp_path / "x.pt")
    store.put(str(tmp_path / "x.pt"), "/run/step-6.pt")
    for step, name in ((5, "step-5.safetensors"), (6, "step-6.pt")):
        with open_checkpoint(f"memory://run/{name}") as checkpoint:
            assert_reads(checkpoint, state(), piece)
            assert checkpoint.step == step
            checkpoint.check_unchanged()


@pytest.mark.filterwarnings("ignore")
def test_folders(store, tmp_path):
    dcp.save({"model": state()}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    store.put(str(tmp_path / "dcp"), "/run/dcp", recursive=True)
    save_file(state(), tmp_path / "model.safetensors")
    store.put(str(tmp_path / "model.safetensors"), "/run/checkpoint-7/model.safetensors")
    for name in ("dcp", "checkpoint-7"):
        with open_checkpoint(f"memory://run/{name}/") as checkpoint:
            assert_reads(checkpoint, state())
    assert open_checkpoint("memory://run/checkpoint-7").step == 7


def test_only_ranges_are_read(store, monkeypatch):
    """The header of a large file costs a block, not the file."""
    store.pipe("/x.safetensors", save({"w": torch.zeros(3_000_000)}))
    asked = []
    whole = type(store).cat_file

    def counting(self, path, start=None, end=None, **more):
        asked.append(end - start)
        return whole(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(store), "cat_file", counting)
    open_checkpoint("memory://x.safetensors")
    assert sum(asked) <= storage.BLOCK_BYTES


def test_what_is_missing_changed_or_unknown(store):
    with pytest.raises(ArgumentError, match="nothing at memory://none"):
        open_checkpoint("memory://none.pt")
    with pytest.raises(ArgumentError, match="cannot be opened"):
        open_checkpoint("nonsense://x.pt")
    store.pipe("/x.safetensors", save({"w": torch.zeros(3)}))
    checkpoint = open_checkpoint("memory://x.safetensors")
    store.pipe("/x.safetensors", save({"w": torch.zeros(4)}))
    with pytest.raises(FormatError, match="was changed"):
        checkpoint.check_unchanged()


class Files(http.server.BaseHTTPRequestHandler):
    """A web server of one file; it supports ranges if `ranges` is set."""

    data = b""
    ranges = True

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if not self.path.endswith(".safetensors"):  # folders cannot be listed
            self.send_error(404)
            return
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        data = self.data
        if asked and self.ranges:
            first, last = map(int, asked.groups())
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.data)}")
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Files,), {"data": save({"w": torch.ones(1_200_000)})})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/step-8.safetensors"
    server.shutdown()
    thread.join()
    server.server_close()


def test_https_by_ranges(web):
    _, address = web
    with open_checkpoint(address) as checkpoint:
        assert_reads(checkpoint, {"w": torch.ones(1_200_000)}, piece=1_000_000)
        assert checkpoint.step == 8


def test_a_web_folder_that_cannot_be_listed(web):
    """A name that is the same in every checkpoint folder: its step may be in a file beside it."""
    _, address = web
    with open_checkpoint(
        address.replace("step-8.safetensors", "step-5/model.safetensors")
    ) as checkpoint:
        assert checkpoint.step == 5


def test_a_server_without_ranges_is_refused(web):
    handler, address = web
    handler.ranges = False
    with pytest.raises(FormatError, match=r"does not support ranges|size is known"):
        open_checkpoint(address)
