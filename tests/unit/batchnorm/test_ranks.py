"""Under a process group the statistics are those of the data of all ranks (gloo, two processes)."""

from __future__ import annotations

from pathlib import Path

import torch
from reference import batchnorm_rank
from reference.batchnorm import channel_statistics, instance_statistics
from torch import multiprocessing

from polyak.batchnorm.moments import InstanceMoments


def test_two_ranks_merge_to_the_same_bits(tmp_path: Path) -> None:
    multiprocessing.spawn(batchnorm_rank.run, args=(str(tmp_path),), nprocs=2)
    (first, messages), (second, _) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    mean, variance = channel_statistics(batchnorm_rank.data())
    torch.testing.assert_close(first["0.running_mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(first["0.running_var"].double(), variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(first["alone"].double(), variance, rtol=1e-6, atol=0)
    assert first["0.num_batches_tracked"] == 8
    assert (first["1.running_mean"].abs() < 1).all()
    assert "no batches" in messages[0]
    assert "saw a NaN" in messages[1]  # on the rank whose own data were clean


def test_instance_statistics_merge_by_instances() -> None:
    """The arithmetic of the merge, without processes."""
    whole = batchnorm_rank.data()
    parts = []
    for piece in (whole[:17], whole[17:]):
        mean, variance = instance_statistics(piece)
        parts.append(InstanceMoments.of([len(piece)], mean[None], variance[None]))
    parts[0].add(parts[1])
    mean, variance = instance_statistics(whole)
    torch.testing.assert_close(parts[0].mean, mean)
    torch.testing.assert_close(parts[0].variance(), variance)
