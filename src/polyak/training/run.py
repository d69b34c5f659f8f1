"""Reading a run folder.

::

    recipe.toml                            the resolved recipe
    metrics.jsonl                          a line for each epoch of each arm, and for each final result
    swa.safetensors                        the averaged model, with what it is made of
    weights/seed-0/<arm>.safetensors       the last iterate (first seed only, as all of weights/)
    weights/seed-0/<arm>-average.safetensors   the SWA of an averaging arm
    weights/seed-0/<arm>-ema.safetensors       the EMA
    weights/seed-0/<arm>-epoch-031.safetensors each of the weights that were averaged
    checkpoints/                           what --resume goes on from
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.errors import ArgumentError, FormatError
from polyak.training.data import Data, load_data
from polyak.training.models import build_model
from polyak.training.recipe import Recipe, load_recipe

_SUFFIX_OF = {"iterate": "", "swa": "-average", "ema": "-ema"}


class Run:
    """A run folder: its recipe, records, weights, and the data and model it used.

    Raises ArgumentError where there is no run, FormatError where a file of it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "recipe.toml").is_file():
            raise ArgumentError(
                f"{self.folder} is not a run: it has no recipe.toml. Give the folder that "
                "`polyak train` wrote."
            )

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(str(self.folder / "recipe.toml"))

    def records(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`, in order; a last line that is cut short is left out."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.split("\n")[:-1]  # what follows the last newline is not whole
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise FormatError(f"{path} is damaged: {error}.") from error

    def epochs(self, *, seed: int = 0, arm: str | None = None) -> list[dict[str, Any]]:
        """The records of one seed's epochs, of one arm or all."""
        return [
            record
            for record in self.records()
            if record["kind"] == "epoch" and record["seed"] == seed and arm in (None, record["arm"])
        ]

    def finals(self) -> list[dict[str, Any]]:
        """The final test results, one for each seed, arm, and kind of weights."""
        return [record for record in self.records() if record["kind"] == "final"]

    def is_finished(self) -> bool:
        """Whether every arm of every seed has its final results."""
        done = {(record["seed"], record["arm"]) for record in self.finals()}
        return len(done) == self.recipe.seeds * len(self.recipe.arms)

    def averaged_epochs(self, arm: str, *, seed: int = 0) -> list[int]:
        """After which epochs the weights that an arm's SWA is made of were taken and kept."""
        names = (self.folder / "weights" / f"seed-{seed}").glob(f"{arm}-epoch-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in names)

    def weights(self, seed: int, arm: str, name: str) -> dict[str, Tensor]:
        """A state dict: `name` is iterate, swa, ema, or epoch-031 for averaged weights."""
        path = weights_path(self.folder, seed, arm, name)
        if not path.is_file():
            raise ArgumentError(
                f"{path} does not exist. Weights are kept for the first seed, of arms that have "
                "finished."
            )
        try:
            return load_file(path)
        except SafetensorError as error:
            raise FormatError(
                f"{path} is damaged: {error}. Train again with another --output."
            ) from error

    @functools.cached_property
    def data(self) -> Data:
        """The data the run was trained and tested on."""
        return load_data(self.recipe)

    def model(self) -> nn.Module:
        """The model of the run with fresh weights, ready for `load_state_dict`."""
        return build_model(self.recipe, self.data)


def weights_path(folder: Path, seed: int, arm: str, name: str) -> Path:
    """Where weights lie in a run folder."""
    suffix = _SUFFIX_OF.get(name, f"-{name}")
    return folder / "weights" / f"seed-{seed}" / f"{arm}{suffix}.safetensors"
