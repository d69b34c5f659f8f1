"""What a run's page begins with: the verdict, what was trained on what, the picture, and what to do next."""

from __future__ import annotations

import base64
import io
import shlex
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from polyak.maths.numbers import count
from polyak.reference_run.data import Data
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.run import Run
from polyak.reference_run.text import TextData
from polyak.report import verdict, words
from polyak.report.budget import ANNEALED, Budget, budget_of, mean_curve
from polyak.report.drawing import Drawing, Picture, draw
from polyak.report.figures import Band, plot_budget
from polyak.report.tables import IMAGES, Finals

_NETWORKS = {
    "residual": "a small residual network with BatchNorm",
    "taught": "two convolutions and a hidden layer",
    "transformer": "a small decoder-only transformer",
    "transformer-4x256": "a decoder-only transformer of 4 layers of 256",
}
_MOST_CLASSES = 10  # of which an image is shown


@dataclass(frozen=True)
class Opening:
    """The content of the page's beginning; the picture is drawn for wide and for narrow screens."""

    verdict: str
    facts: dict[str, str]
    images: str
    what: str
    wide: Drawing | None
    narrow: Drawing | None
    shares: list[str]
    lines: list[str]
    next: list[str]
    code: str


def opening_of(run: Run, finals: Finals) -> Opening:
    """The beginning of a run's page."""
    is_text = run.recipe.task == "words"
    told = words if is_text else verdict
    arm, budget = run.averaging_arm(), budget_of(run, finals.metrics[0].key)
    drawn = [draw(picture, f"{picture.name}-") for picture in budget_pictures(budget, finals)]
    wide, narrow = drawn or (None, None)
    return Opening(
        verdict=_no_average(finals) if arm is None else told.verdict(finals, arm),
        facts=facts(run),
        images="" if is_text else image_strip(run.data),
        what="loss" if is_text else "error",
        wide=wide,
        narrow=narrow,
        shares=told.shares(budget) if budget else [],
        lines=told.lines(finals, arm) if arm else [],
        next=_next(run) if arm else [],
        code=_code(run) if arm else "",
    )


def _no_average(finals: Finals) -> str:
    name = "SGD" if finals.terms == IMAGES else "a cosine decay"
    return f"No averaging arm has finished yet: these are the results of {name}, {count(finals.n_seeds, 'seed')}."


def facts(run: Run) -> dict[str, str]:
    """Data, network, length and circumstances of a run."""
    recipe, origin = run.recipe, run.origin
    n = sum(parameter.numel() for parameter in run.model().parameters())
    network = (
        f"the network of {recipe.model}"
        if recipe.model
        else _NETWORKS.get(recipe.network, recipe.network)
    )
    if recipe.batchnorm:
        network += ", with BatchNorm"
    jobs = origin.get("jobs", "1")
    threads = (
        count(int(origin["threads"]), "thread") if "threads" in origin else "threads not recorded"
    )
    beside = "" if jobs == "1" else f" in each of {jobs} processes side by side"
    found = {
        "Data": describe_data(recipe, run.data),
        "Network": f"{network}, {count(n, 'parameter')}",
        "Length": f"{_length(recipe)}, {count(recipe.seeds, 'seed')}, the same batches in all arms",
        "Trained": f"{origin.get('started', 'at an unknown time')[:10]}, {threads}{beside}, "
        f"{origin.get('device', recipe.device)}",
    }
    if isinstance(run.data, TextData):
        found["A window"] = excerpt(run.data)
    if "torch" in origin:
        found["Trained"] += f", torch {origin['torch']}"
    return found


def _length(recipe: Recipe) -> str:
    epochs = count(recipe.epochs, "epoch")
    if not recipe.epoch_size:
        return epochs
    what = "window" if recipe.task == "words" else "image"
    return f"{epochs} of {count(recipe.epoch_size, what)}"


def describe_text(recipe: Recipe, data: TextData) -> str:
    """The text by its name, and what is done with its parts."""
    name = recipe.data or "Moby-Dick (Melville 1851), the chapters that polyak ships"
    trained = len(data.train) + data.context
    measured = (part.labels.numel() for part in (data.validation, data.test))
    validation, test = (f"{n:,}" for n in measured)
    return (
        f"{name}: {len(data.text):,} bytes, of which the first {trained:,} are to train on, {validation} of the "
        f"next twentieth to validate on, {test} of the last one to test on; windows of {data.context} bytes"
    )


def excerpt(data: Data) -> str:
    """The first test window, in quotation marks."""
    text = bytes(data.test.inputs[0].tolist()).decode("utf-8", errors="replace")
    return f"“{' '.join(text.split())}”"


def describe_data(recipe: Recipe, data: Data) -> str:
    """The data by its name, and how many images of what size."""
    if isinstance(data, TextData):
        return describe_text(recipe, data)
    if recipe.data or recipe.data_folder:
        name = recipe.data or recipe.data_folder
    else:
        name = "Fashion-MNIST (Xiao et al. 2017), the images that polyak ships"
    sizes = (f"{len(part):,}" for part in (data.train, data.validation, data.test))
    train, validation, test = sizes
    kinds = "grey" if data.n_channels == 1 else f"{data.n_channels} channels"
    return (
        f"{name}: {train} images to train on, {validation} to validate on, {test} to test on; "
        f"{data.image_size} × {data.image_size} pixels, {kinds}, {count(data.n_classes, 'class')[:-1]}es"
    )


def image_strip(data: Data) -> str:
    """The first image of each of the first classes side by side, as the address of a PNG."""
    from matplotlib.image import imsave

    labels = data.train.labels
    classes = torch.unique(labels)[:_MOST_CLASSES].tolist()
    chosen = [data.train.images[int((labels == c).nonzero()[0])].numpy() for c in classes]
    pixels = np.concatenate(chosen, axis=2)
    pixels = pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]
    low, high = float(pixels.min()), float(pixels.max())
    buffer = io.BytesIO()
    scaled = (pixels - low) / max(high - low, 1e-12)
    imsave(buffer, scaled, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def budget_pictures(budget: Budget | None, finals: Finals) -> list[Picture]:
    """The picture over the budget, for wide and for narrow screens; none without averages."""
    if budget is None:
        return []
    labels = {
        "iterate": "iterate, constant rate" if budget.is_constant else "iterate",
        "ema": "its EMA",
        "power": "its power EMA",
        "swa": "its SWA",
    }
    averaged = {
        label: Band(*mean_curve(budget.averaged[kind]))
        for kind, label in labels.items()
        if kind in budget.averaged
    }
    annealed = {ANNEALED[arm]: Band(*mean_curve(values)) for arm, values in budget.annealed.items()}
    is_text = finals.terms != IMAGES
    plot = partial(
        plot_budget,
        averaged=averaged,
        annealed=annealed,
        ylabel="validation loss (nats per byte)" if is_text else "validation error (%)",
        ylim=_limits(averaged, annealed),
    )
    shown = ", ".join([*averaged, *annealed])
    alt = (
        f"Validation {'loss' if is_text else 'error'} over the budget: {shown}; means over "
        f"{count(finals.n_seeds, 'seed')}"
    )
    return [
        Picture("budget", alt, plot, (8.2, 3.7)),
        Picture("budget-narrow", alt, plot, (4.2, 4.4), has_png=False),
    ]


def _limits(averaged: dict[str, Band], annealed: dict[str, Band]) -> tuple[float, float]:
    """A scale that shows the averages: without the first tenth, which would compress the rest."""
    bands = [*averaged.values(), *annealed.values()]
    low = min(float(band.low.min()) for band in bands)
    late = [band.mean[band.x > 0.15 * band.x[-1]] for band in bands]
    high = max(float(values.max()) for values in late if len(values))
    return low - 0.05 * (high - low), high + 0.1 * (high - low)


def _next(run: Run) -> list[str]:
    statistics = ", with BatchNorm statistics of its own if the network has them"
    return [
        f"The averaged model is {run.folder / 'swa.safetensors'}: the SWA of seed "
        f"{run.recipe.first_seed}{statistics if run.recipe.task == 'images' else ''}.",
        "To average your own training, read docs/average.md; to choose an average, docs/which-average.md; "
        "whether it is worth it for you, docs/should-i-average.md.",
        f"Another recipe or length: polyak train --help. This page again: polyak report "
        f"{shlex.quote(str(run.folder))}",
    ]


def _code(run: Run) -> str:
    return (
        "from polyak.reference_run import Run\n"
        f"run = Run({str(run.folder)!r})\n"
        "model = run.averaged_model()\n"
    )
