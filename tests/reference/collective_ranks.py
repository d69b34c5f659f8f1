"""What each of four processes does in the tests of `write_collectively`."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 4
TIES = {"tail": "matrix"}
METADATA = {"profile": "SWA()", "count": "3"}


def whole():
    """The tensors of the model: several dtypes, sizes that no number of ranks divides, nothing at all."""
    torch.manual_seed(3)
    return {
        "half": torch.randn(9, 7).to(torch.bfloat16),
        "matrix": torch.randn(9, 7),
        "columns": torch.randn(5, 10),
        "cube": torch.randn(3, 6, 5),
        "few": torch.randn(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor([7]),
        "wide": torch.randn(64, 96).to(torch.float64),
    }


def boxes_of(rank):
    """Each tensor cut in another way: by rows, by columns, in blocks, in the middle; strided or not."""
    tensors = whole()
    block, column = divmod(rank, 2)
    cuts = {
        "half": (slice(3 * rank, 3 * rank + 3),),
        "matrix": (slice(4 * block, (4, 9)[block]), slice(3 * column, (3, 7)[column])),
        "columns": (slice(None), slice(3 * rank, 3 * rank + 3)),
        "cube": (slice(None), slice(2 * rank, 2 * rank + 2)),
        "few": (slice(rank, rank + 1),),
        "wide": (slice(None), slice(24 * rank, 24 * rank + 24)),
    }
    found = {}
    for name, tensor in tensors.items():
        boxes = (
            [((0,) * tensor.dim(), tensor)] if rank == 1 else []
        )  # replicated: one rank's counts
        if name in cuts:
            cut = cuts[name]
            offsets = [c.start or 0 for c in cut] + [0] * (tensor.dim() - len(cut))
            box = tensor[cut]
            boxes = [(offsets, box if rank % 2 else box.contiguous())]
            if name == "half":  # two boxes on one rank, one of them transposed in memory
                box = box.t().contiguous().t()
                boxes = [(offsets, box[:, :2]), ([offsets[0], 2], box[:, 2:])]
        found[name] = (tensor.dtype, tensor.shape, [(o, b) for o, b in boxes if b.numel()])
    return found


def run(rank, folder, calls):
    """Make the calls, all on all ranks, and note what each rank was told."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    told = {name: _told(call, rank, Path(folder)) for name, call in calls.items()}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def _told(call, rank, folder):
    from polyak.errors import PolyakError

    try:
        call(rank, folder)
    except PolyakError as error:
        return [type(error).__name__, str(error)]
    return "nothing"
