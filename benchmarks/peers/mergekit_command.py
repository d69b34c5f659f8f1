"""mergekit, from an environment of its own: MERGEKIT is the path of its `mergekit-yaml`.

Its `mergekit-pytorch` takes tensors of any names and shapes; the methods are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from peers import Peer, State

_NAMES = {
    "mean": "linear",
    "ties": "ties",
    "dare": "dare_linear",
    "model-stock": "model_stock",
    "slerp": "slerp",
}


class Mergekit(Peer):
    name = "mergekit"

    @property
    def version(self) -> str:
        python = Path(os.environ["MERGEKIT"]).with_name("python")
        asked = "from importlib.metadata import version; print(version('mergekit'))"
        return subprocess.check_output([python, "-c", asked], text=True).strip()

    def combine(self, method: str, base: State | None, runs: list[State], **how: Any) -> State:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            paths = [_saved(run, place / f"run-{n}.safetensors") for n, run in enumerate(runs)]
            each = {} if method in ("slerp", "model-stock") else {"weight": 1.0, **how}
            if method == "dare":
                each["weight"] = 1 / len(runs)
            recipe: dict[str, Any] = {
                "merge_method": _NAMES[method],
                "models": [{"model": path, "parameters": each} for path in paths],
            }
            if method == "slerp":
                recipe |= {"base_model": paths[0], "parameters": how}
            elif base is not None:
                recipe["base_model"] = _saved(base, place / "base.safetensors")
            (place / "recipe.yml").write_text(json.dumps(recipe))
            command = Path(os.environ["MERGEKIT"]).with_name("mergekit-pytorch")
            called = [command, place / "recipe.yml", place / "merged", "--random-seed", "0"]
            subprocess.run(called, check=True, capture_output=True)
            merged: State = {}
            for file in sorted((place / "merged").glob("*.safetensors")):
                merged = {**merged, **load_file(file)}
            return merged


def _saved(state: Mapping[str, Any], path: Path) -> str:
    save_file(dict(state), path)
    return str(path)
