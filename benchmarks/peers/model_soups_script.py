"""`main.py` of the model soups paper's repository, whose folder is MODEL_SOUPS.

It is a script for 72 CLIP models and ImageNet. It is run as it is, but for that number, with stand-ins for
what it imports to build networks and to evaluate them: what is left is how it mixes and chooses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from peers import NotOffered, Peer, State


class ModelSoups(Peer):
    name = "model-soups"

    @property
    def version(self) -> str:
        command = ["git", "-C", os.environ["MODEL_SOUPS"], "rev-parse", "--short", "HEAD"]
        return subprocess.check_output(command, text=True).strip()

    def combine(self, method: str, base: State | None, runs: list[State], **how: Any) -> State:
        if method != "mean":
            raise NotOffered
        return _run("--uniform-soup", runs, lambda state: 0.0)["uniform_soup"]

    def greedy(self, runs: list[State], score: Callable[[State], float]) -> State:
        return _run("--greedy-soup", runs, score)["greedy_soup_params"]


def _run(flag: str, runs: list[State], score: Callable[[State], float]) -> dict[str, Any]:
    """The script's variables at its end."""
    source = Path(os.environ["MODEL_SOUPS"], "main.py").read_text()
    assert "NUM_MODELS = 72" in source
    code = compile(
        source.replace("NUM_MODELS = 72", f"NUM_MODELS = {len(runs)}"), "main.py", "exec"
    )
    found: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for number, run in enumerate(runs):
            torch.save(dict(run), f"model_{number}.pt")
        arguments = ["main.py", flag, "--eval-individual-models", "--model-location", folder]
        with patch.dict(sys.modules, _stand_ins(score)), patch.object(sys, "argv", arguments):
            exec(code, found)
    return found


def _stand_ins(score: Callable[[State], float]) -> dict[str, Any]:
    names = ("wget", "clip", "datasets", "utils", "matplotlib", "matplotlib.pyplot", "pandas")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["matplotlib"].pyplot = modules["matplotlib.pyplot"]
    modules["clip"].load = lambda *args, **options: (None, None)
    modules["utils"].get_model_from_sd = lambda state, model: state
    modules["utils"].test_model_on_dataset = lambda state, dataset: score(state)
    modules["pandas"].read_json = _Rows
    for name in ("2p", "", "V2", "Sketch", "R", "A"):
        setattr(modules["datasets"], f"ImageNet{name}", type(f"ImageNet{name}", (_Data,), {}))
    modules["datasets"].ObjectNet = type("ObjectNet", (_Data,), {})
    return modules


class _Data:
    def __init__(self, *args: Any) -> None:
        pass


class _Rows:
    """What the script reads of a table of pandas."""

    def __init__(self, path: str, lines: bool) -> None:
        self._rows = [json.loads(line) for line in Path(path).read_text().splitlines()]

    def iterrows(self) -> Any:
        return enumerate(self._rows)
