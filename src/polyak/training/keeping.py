"""The weights that a run keeps: those of its first seed, and the averaged model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from polyak.checkpoints.files import replacing
from polyak.training.arm import Arm
from polyak.training.run import weights_path

_KEPT_SEED = 0


def keep_averaged(folder: Path, arm: Arm, epoch: int) -> None:
    """Keep the weights that were averaged after so many epochs."""
    if arm.seed == _KEPT_SEED:
        _keep_iterate(weights_path(folder, arm.seed, arm.name, f"epoch-{epoch:03d}"), arm.model)


def keep_arm(folder: Path, arm: Arm) -> None:
    """Keep an arm's last iterate and averages; the first SWA is the run's `swa.safetensors`."""
    if arm.seed != _KEPT_SEED:
        return
    _keep_iterate(weights_path(folder, arm.seed, arm.name, "iterate"), arm.model)
    for kind, average in arm.averages.items():
        average.save(weights_path(folder, arm.seed, arm.name, kind), overwrite=True)
    if arm.name == next((name for name in arm.recipe.arms if name != "sgd"), None):
        arm.averages["swa"].save(folder / "swa.safetensors", overwrite=True)


def _keep_iterate(path: Path, model: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as part:
        part.write_bytes(save(_plain(model.state_dict())))


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors takes no channels-last tensor, and none that shares memory with another.
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
