"""Files of weights: read lazily, merged in one pass, written beside and then moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "Checkpoint": "polyak.checkpoints.reading.stored",
    "CheckpointDiff": "polyak.checkpoints.diff",
    "Dare": "polyak.checkpoints.merging.deltas",
    "Distance": "polyak.checkpoints.diff",
    "Inspection": "polyak.checkpoints.inspect",
    "MergeResult": "polyak.checkpoints.merging.average",
    "MergedAdapters": "polyak.checkpoints.merging.lora",
    "ModelStock": "polyak.checkpoints.merging.deltas",
    "OutputWeights": "polyak.checkpoints.merging.weights",
    "Selection": "polyak.checkpoints.merging.selection",
    "Slerp": "polyak.checkpoints.merging.deltas",
    "StoredTensor": "polyak.checkpoints.reading.stored",
    "Ties": "polyak.checkpoints.merging.deltas",
    "average_checkpoints": "polyak.checkpoints.merging.average",
    "diff_checkpoints": "polyak.checkpoints.diff",
    "inspect_checkpoint": "polyak.checkpoints.inspect",
    "iter_averaged_tensors": "polyak.checkpoints.merging.average",
    "merge_adapters": "polyak.checkpoints.merging.lora",
    "open_checkpoint": "polyak.checkpoints.reading.opening",
    "select_checkpoints": "polyak.checkpoints.merging.selection",
    "thin_record": "polyak.checkpoints.thinning",
}

if TYPE_CHECKING:
    from polyak.checkpoints.diff import CheckpointDiff as CheckpointDiff
    from polyak.checkpoints.diff import Distance as Distance
    from polyak.checkpoints.diff import diff_checkpoints as diff_checkpoints
    from polyak.checkpoints.inspect import Inspection as Inspection
    from polyak.checkpoints.inspect import inspect_checkpoint as inspect_checkpoint
    from polyak.checkpoints.merging.average import MergeResult as MergeResult
    from polyak.checkpoints.merging.average import average_checkpoints as average_checkpoints
    from polyak.checkpoints.merging.average import iter_averaged_tensors as iter_averaged_tensors
    from polyak.checkpoints.merging.deltas import Dare as Dare
    from polyak.checkpoints.merging.deltas import ModelStock as ModelStock
    from polyak.checkpoints.merging.deltas import Slerp as Slerp
    from polyak.checkpoints.merging.deltas import Ties as Ties
    from polyak.checkpoints.merging.lora import MergedAdapters as MergedAdapters
    from polyak.checkpoints.merging.lora import merge_adapters as merge_adapters
    from polyak.checkpoints.merging.selection import Selection as Selection
    from polyak.checkpoints.merging.selection import select_checkpoints as select_checkpoints
    from polyak.checkpoints.merging.weights import OutputWeights as OutputWeights
    from polyak.checkpoints.reading.opening import open_checkpoint as open_checkpoint
    from polyak.checkpoints.reading.stored import Checkpoint as Checkpoint
    from polyak.checkpoints.reading.stored import StoredTensor as StoredTensor
    from polyak.checkpoints.thinning import thin_record as thin_record

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
