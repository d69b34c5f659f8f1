"""One mean of a few files, by the calling thread alone: for a record that grows while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from polyak.checkpoints.merging.engine import Worker
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.outputs import byte_runs
from polyak.checkpoints.merging.prepare import prepared
from polyak.checkpoints.merging.weights import OutputWeights
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing.layouts import OutputFile
from polyak.files import replacing


def merge_into(target: Path, inputs: Sequence[Checkpoint], weights: OutputWeights) -> None:
    """Write the weighted mean of opened checkpoints to `target`, which may be one of them.

    The engine's threads would change the number of threads that torch uses everywhere; this uses none.
    inputs: oldest first; the others' names for their order are not asked for.
    """
    for index, one in enumerate(inputs):
        one.step = index
    beside = target.with_name(f".mean-of-{target.name}")  # never written: `replacing` writes
    with prepared(inputs, {beside: weights}, MergeOptions()) as merge:
        output = merge.blueprints[0]
        layout = output.layouts[""]
        with (
            replacing(target, overwrite=True) as part,
            closing(OutputFile(part, layout.size)) as file,
        ):
            layout.begin(file)
            worker = Worker(merge.job([byte_runs(merge.plan, output.places, {"": file})]))
            for index in range(len(merge.plan)):
                worker.merge(merge.plan[index], checksums=False)
            for one in inputs:
                one.check_unchanged()
            layout.finish(file, output.metadata)
