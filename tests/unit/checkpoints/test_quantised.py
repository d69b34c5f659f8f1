"""Quantised tensors are refused by what they are, and harmless integers are not."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.checkpoints.merging.average import average_checkpoints
from polyak.errors import FormatError


def integers(dtype, *shape):
    return torch.randint(0, 100, shape, dtype=dtype)


KINDS = {
    "VPTQ": lambda: {
        "l.indices": integers(torch.uint16, 4, 8), "l.centroids.weight": torch.rand(1, 64),
    },
    "QuIP#": lambda: {"l.Qidxs": integers(torch.int64, 4, 8), "l.SU": torch.rand(8)},
    "a stack of experts": lambda: {
        "experts.w1_codes": integers(torch.uint8, 2, 4, 8), "experts.w1_scales": torch.rand(2, 4),
    },
    "LSQ": lambda: {"a.act_scale": torch.rand(1), "a.act_zero_point": integers(torch.int8, 1)},
    "per channel": lambda: {"f.scale": torch.rand(4), "f.zp": integers(torch.int64, 4)},
}  # fmt: skip


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_they_are_refused_by_what_they_are(tmp_path, make):
    torch.manual_seed(1)
    paths = []
    for step in (1, 2, 3):
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file({**make(), "other.weight": torch.rand(2, 2)}, paths[-1])
    out = tmp_path / "out.safetensors"
    name = next(name for name, tensor in make().items() if not tensor.is_floating_point())
    with pytest.raises(FormatError, match=rf"quantised.* {name}.*exclude="):
        average_checkpoints(paths, out)
    assert not out.exists()
    average_checkpoints(paths, out, exclude=[f"{name[0]}*", "experts*"][: 1 + (name[0] == "e")])
    assert torch.equal(load_file(out)[name], load_file(paths[-1])[name])


def test_integers_that_are_equal_or_few_are_no_codes(tmp_path):
    torch.manual_seed(1)
    table = integers(torch.int64, 4, 8)
    paths = []
    for step in (1, 2):
        state = {
            "position_ids": table, "step": torch.tensor(step), "queue.labels": integers(torch.int64, 9),
            "mask": torch.rand(4, 8) > 0.5, "frozen.scale": torch.rand(1),
            "frozen.zero_point": torch.tensor([3]), "lone.zero_point": torch.tensor(step),
        }  # fmt: skip
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file(state, paths[-1])
    average_checkpoints(paths, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[n], t) for n, t in state.items() if not t.is_floating_point())


def test_reading_ends_at_the_first_difference(tmp_path, monkeypatch):
    from polyak.checkpoints.reading.stored import PIECE_BYTES, SpanTensor

    paths = []
    for step in (1, 2):
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file({"codes": torch.full((4, PIECE_BYTES), step, dtype=torch.uint8)}, paths[-1])
    read = []
    whole = SpanTensor.read_into

    def counting(self, start, buffer):
        read.append(len(buffer))
        whole(self, start, buffer)

    monkeypatch.setattr(SpanTensor, "read_into", counting)
    with pytest.raises(FormatError, match="codes"):
        average_checkpoints(paths, tmp_path / "out.safetensors")
    assert sum(read) == 2 * PIECE_BYTES
