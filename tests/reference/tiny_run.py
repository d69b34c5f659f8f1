"""A run folder made in a moment: random weights and made-up records in the format of `polyak train`."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

import polyak
from polyak.reference_run.arm import steps_per_epoch
from polyak.reference_run.recipe import Recipe, load_recipe
from polyak.reference_run.recording import record_folder
from polyak.reference_run.run import Run, weights_path

EPOCHS, BRANCH, SEEDS = 8, 4, 3
SIZE = 12


def images():
    """60 images of 12 pixels for each split, 10 classes; named by the recipe's `data`."""
    generator = torch.Generator().manual_seed(0)
    make = lambda: (torch.randn(60, 1, SIZE, SIZE, generator=generator), torch.arange(60) % 10)  # noqa: E731
    return {"train": make(), "validation": make(), "test": make()}


def make_run(folder, *, arms=("sgd", "half", "swa", "cyclic"), **fields):
    """Write a finished run and return its folder; `fields` go to the recipe."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    given = {
        "name": folder.name, "network": "taught", "epochs": EPOCHS, "seeds": SEEDS, "arms": arms,
        "cycle_epochs": 1, "data": "reference.tiny_run:images", "device": "cpu",
    }  # fmt: skip
    recipe = Recipe(**given | fields)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    records = [r for seed in range(SEEDS) for arm in arms for r in _records(recipe, seed, arm)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for arm in arms:
        _write_weights(Run(folder), arm)
    return folder


def make_words_run(folder, **fields):
    """The same of a language model, on a text beside the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    text = folder.parent / "text.txt"
    text.write_bytes(b"It was the Whiteness of the whale that above all things appalled me. " * 100)
    given = {
        "name": folder.name, "epochs": EPOCHS, "epoch_size": 64, "batch_size": 16, "context": 16, "seeds": SEEDS,
        "data": str(text), "device": "cpu",
    }  # fmt: skip
    recipe = dataclasses.replace(load_recipe("words"), **given | fields)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    records = [
        r for seed in range(SEEDS) for arm in recipe.arms for r in _records(recipe, seed, arm)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    _write_weights(Run(folder), "constant")
    return folder


def write_record(folder, arm="swa"):
    """The record of a walk from initial weights, an interval for each step."""
    run = Run(folder)
    model, steps = run.model(), EPOCHS * steps_per_epoch(run.recipe, len(run.data.train))
    path = record_folder(Path(folder), 0, arm)
    with polyak.Recorder(model, path, total=steps, intervals=steps) as recorder:
        for _ in range(steps):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
            recorder.update()


def _kinds(arm):
    averages = ("iterate", "swa", "ema", "power", "wsm")
    kinds = {"sgd": ("iterate", "ema"), "half": ("iterate",), "quarter": ("iterate",)}
    kinds |= {"cosine": averages, "constant": averages}
    return kinds.get(arm, ("iterate", "swa", "ema"))


def _records(recipe, seed, arm):
    for epoch in range(recipe.first_epoch(arm) + 1, recipe.last_epoch(arm) + 1):
        shift = {"iterate": 0.2, "swa": 0.0, "ema": 0.1, "power": 0.12}
        values = {
            kind: {"error": 14 + shift[kind] + 8 / epoch + seed / 9, "nll": 0.4 + 1 / epoch}
            for kind in _kinds(arm)
            if kind in ("iterate", "ema", "power") or (kind == "swa" and epoch >= recipe.swa_epoch)
        }
        yield {
            "kind": "epoch", "seed": seed, "arm": arm, "epoch": epoch, "step": epoch, "rate": 0.05,
            "train_loss": 1 / epoch, "evaluations": values, "averaged": "swa" in values,
        }  # fmt: skip
    for index, kind in enumerate(_kinds(arm)):
        yield _final(
            recipe.task,
            seed,
            arm,
            kind,
            13.5 + 0.1 * seed - 0.3 * index + 0.05 * math.sin(9 * seed),
        )


def _final(task, seed, arm, kind, error):
    if task == "words":
        return {
            "kind": "final", "seed": seed, "arm": arm, "weights": kind, "error": error, "nll": error / 30,
            "int8_rise": error / 40, "int4_rise": 3 * error,
        }  # fmt: skip
    bins = {
        "confidence": [(b + 0.5) / 15 for b in range(15)],
        "accuracy": [(b + 0.2) / 15 for b in range(15)],
        "count": [0] * 7 + [10 * b for b in range(8)],
    }
    return {
        "kind": "final", "seed": seed, "arm": arm, "weights": kind, "error": error,
        "nll": error / 30, "ece": error / 2, "temperature": 1.3, "nll_scaled": error / 32,
        "reliability": bins,
    }  # fmt: skip


def _write_weights(run, arm):
    torch.manual_seed(len(arm))
    model = run.model()
    names = {kind: model.state_dict() for kind in _kinds(arm)}
    if "swa" in names:
        names |= {f"epoch-{epoch:03d}": model.state_dict() for epoch in range(6, EPOCHS + 1)}
        save_file(model.state_dict(), run.folder / "swa.safetensors")
    for name, state in names.items():
        path = weights_path(run.folder, 0, arm, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        near = {
            key: value + 0.03 * torch.randn_like(value) if value.is_floating_point() else value
            for key, value in state.items()
            if "running_var" not in key
        }
        near |= {key: value.clone() for key, value in state.items() if "running_var" in key}
        save_file({key: value.contiguous() for key, value in near.items()}, path)
