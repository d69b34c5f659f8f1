"""What a file of Lightning holds beside the weights, so that an average of such files is one too."""

from __future__ import annotations

from typing import Any

from polyak.checkpoints.reading.legacy_torch import LegacyTorch, is_legacy
from polyak.checkpoints.reading.plain import NOTHING, PlainCopy
from polyak.checkpoints.reading.stored import ByteFile, Checkpoint
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.torch_file import TorchFile

VERSION = "pytorch-lightning_version"
"""The entry by which Lightning knows its files."""

# What resumes a run: it belongs to the weights of one step. Lightning leaves it out of its own files
# with `save_weights_only=True`, but for the last line: its weight averaging, and fp16 scalers.
_OF_THE_RUN = {
    "callbacks", "optimizer_states", "lr_schedulers",
    "current_model_state", "averaging_state", "MixedPrecision", "native_amp_scaling_state",
    "amp_scaling_state",
}  # fmt: skip
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


def lightning_entries(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The entries beside the weights, in order, and what of them was left out: name -> what it is.

    None unless Lightning wrote the file. `state_dict` is among the entries, to keep its place, without
    its tensors. Entries are plain values; tensors are kept among the hyper-parameters only.
    """
    is_torch = checkpoint.format in (TorchArchive.format, LegacyTorch.format)
    if not is_torch or VERSION not in checkpoint.metadata:
        return None
    archive = _opened(checkpoint.files[0])
    if archive is None or not isinstance(archive.root, dict) or VERSION not in archive.root:
        return None
    configuration, values, progress = PlainCopy(archive.tensor), PlainCopy(), PlainCopy()
    entries: dict[str, Any] = {}
    for name, value in archive.root.items():
        if name == "state_dict":
            entries[name] = None
        elif isinstance(name, str) and name not in _OF_THE_RUN:
            copy = progress if name == "loops" else values
            copy = configuration if name in _HYPER_PARAMETERS else copy
            entries[name] = copy.of(value, name)
    kept = {name: value for name, value in entries.items() if value is not NOTHING}
    return {**kept, "state_dict": None}, configuration.dropped | values.dropped


def _opened(file: ByteFile) -> TorchFile | None:
    start = file.read(0, min(file.size, 512))
    if start.startswith(b"PK"):
        return TorchArchive(file)
    return LegacyTorch(file) if is_legacy(start) else None
