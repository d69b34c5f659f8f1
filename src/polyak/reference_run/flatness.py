"""The surface around the solutions of a run, measured once on the run's own images and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.errors import FormatError
from polyak.files import replacing
from polyak.reference_run.data import Data, Split
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.loop import plan
from polyak.reference_run.run import Run
from polyak.study.landscape import (
    Grid,
    Line,
    Plane,
    Rays,
    Segments,
    along_line,
    along_rays,
    along_segments,
    on_plane,
)
from polyak.study.surface import Surface

LOSS, ERROR = "train_loss", "test_error"
_FILE = "landscape.json"
_BATCH = 250  # small batches stay in the cache: half the time of 2,000 at once
_LONG_RUN = 8_000_000  # images seen in training; a short one shall not wait for its surface


@dataclass(frozen=True)
class Detail:
    """The resolution of a measurement: images of each split, and points of each picture."""

    n_images: int
    n_line: int  # 4 k + 1, so that both ends are among the points
    n_ray: int
    n_inner: int
    n_grid: int


FULL = Detail(n_images=1500, n_line=25, n_ray=5, n_inner=3, n_grid=11)
SHORT = Detail(n_images=300, n_line=9, n_ray=3, n_inner=3, n_grid=5)
N_RAYS = 10
MARGIN = 0.2  # of the plane's extent, beyond the outermost point on each side
REACH = 0.6  # the longest ray, as a fraction of the length of SGD's weights


@dataclass(frozen=True)
class Landscape:
    """Training loss and test error around the first seed's solutions; see `measure`."""

    arm: str
    detail: Detail
    line: Line
    rays: dict[str, Rays]
    epochs: list[int]
    segments: Segments | None
    grid: Grid | None
    path: np.ndarray  # (n, 2): the averaged iterates in the plane
    average: tuple[float, float, float]  # the average in the plane, and its distance from it


def measure_landscape(run: Run) -> Landscape | None:
    """The surface around a run's solutions; measured and stored in its folder if it is not yet.

    None if no averaging arm has finished, and for a text, whose surface is not measured. Raises OutputError if the folder cannot be written,
    FormatError if what is stored is damaged.
    """
    arm = run.averaging_arm()
    if arm is None or run.recipe.task != "images":
        return None
    if (stored := stored_landscape(run)) is not None:
        return stored
    with replacing(
        run.folder / _FILE
    ) as part:  # a folder that cannot be written is refused at once
        land = measure(run, arm, detail_for(run))
        part.write_text(json.dumps(asdict(land), default=np.ndarray.tolist), encoding="utf-8")
    return land


def stored_landscape(run: Run) -> Landscape | None:
    """What `measure_landscape` stored in the run's folder, or None. Raises FormatError if damaged."""
    path = run.folder / _FILE
    if not path.is_file():
        return None
    try:
        return _landscape(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}). Delete it; `polyak report {run.folder}` measures again."
        ) from error


def detail_for(run: Run) -> Detail:
    """`FULL`, or `SHORT` for a run to which the full measurement would add more than a few percent."""
    seen = len(plan(run.recipe)) * len(run.data.train)
    return SHORT if seen < _LONG_RUN else FULL


def measure(run: Run, arm: str, detail: Detail) -> Landscape:
    """Measure training loss and test error around the first seed's solutions of a run.

    Along the line from SGD's last weights to the average of `arm`; along `N_RAYS` random rays from
    SGD's weights, the arm's last iterate and its average; on the segments between consecutive
    averaged weights; on the plane through the first, middle and last of them (if there are
    three). BatchNorm statistics are measured again at every point.
    """
    hardware, seed = Hardware.named(run.recipe.device), run.recipe.first_seed
    model = hardware.place(run.model())
    with image_surface(model, run.data, detail.n_images, hardware) as surface:
        named = {
            name: surface.vector(run.weights(seed, *place))
            for name, place in {
                "SGD": ("sgd", "iterate"),
                "last iterate": (arm, "iterate"),
                "SWA": (arm, "swa"),
            }.items()
        }
        epochs = run.averaged_epochs(arm)
        path = [surface.vector(run.weights(seed, arm, f"epoch-{epoch:03d}")) for epoch in epochs]
        positions = np.linspace(-0.5, 1.5, detail.n_line).tolist()
        line = along_line(surface, named["SGD"], named["SWA"], positions)
        segments = along_segments(surface, path, n_inner=detail.n_inner) if len(path) > 1 else None
        return Landscape(
            arm, detail, line, _rays(surface, named, detail), epochs, segments,
            *_plane(surface, path, named["SWA"], detail.n_grid),
        )  # fmt: skip


def image_surface(model: nn.Module, data: Data, n_images: int, hardware: Hardware) -> Surface:
    """Training loss (without augmentation) and test error on the first `n_images` of each split.

    Mean cross-entropy in nats, and error in percent. The model is on the hardware; enter the surface
    to measure, as any `Surface`.
    """
    train, test = (_placed(split, n_images, hardware) for split in (data.train, data.test))
    n_train, n_test = (sum(len(labels) for _, labels in split) for split in (train, test))

    def loss_and_error(model: nn.Module) -> Mapping[str, float]:
        with hardware.precision():
            loss = sum(
                float(cross_entropy(model(images).float(), labels, reduction="sum"))
                for images, labels in train
            )
            wrong = sum(int((model(images).argmax(1) != labels).sum()) for images, labels in test)
        return {LOSS: loss / n_train, ERROR: 100 * wrong / n_test}

    return Surface(model, loss_and_error, refresh=[images for images, _ in train])


def _placed(split: Split, n_images: int, hardware: Hardware) -> list[tuple[Tensor, Tensor]]:
    images = hardware.inputs(split.inputs[:n_images])
    labels = split.labels[:n_images].to(hardware.device)
    starts = range(0, len(labels), _BATCH)
    return [(images[i : i + _BATCH], labels[i : i + _BATCH]) for i in starts]


def _rays(surface: Surface, centres: Mapping[str, Tensor], detail: Detail) -> dict[str, Rays]:
    reach = REACH * float(centres["SGD"].norm())
    distances = np.linspace(0, reach, detail.n_ray + 1).tolist()
    return {
        name: along_rays(surface, centre, distances, n_rays=N_RAYS)
        for name, centre in centres.items()
    }


def _plane(
    surface: Surface, path: list[Tensor], average: Tensor, n_grid: int
) -> tuple[Grid | None, np.ndarray, tuple[float, float, float]]:
    if len(path) < 3:
        return None, np.empty((0, 2)), (0.0, 0.0, 0.0)
    plane = Plane.through(path[0], path[len(path) // 2], path[-1])
    feet = np.array([plane.project(point)[:2] for point in path])
    centre = plane.project(average)
    inside = np.vstack([feet, centre[:2]])
    low, high = inside.min(axis=0), inside.max(axis=0)
    half = (0.5 + MARGIN) * float((high - low).max())  # one scale for both axes
    middle = (low + high) / 2
    x, y = (np.linspace(m - half, m + half, n_grid).tolist() for m in middle)
    return on_plane(surface, plane, x, y), feet, centre


def _landscape(values: dict[str, Any]) -> Landscape:
    """The inverse of `asdict` and JSON's lists."""
    segments, grid = values["segments"], values["grid"]
    x, y, distance = map(float, values["average"])
    return Landscape(
        arm=str(values["arm"]),
        detail=Detail(**values["detail"]),
        line=Line(**_arrays(values["line"])),
        rays={name: Rays(**_arrays(rays)) for name, rays in values["rays"].items()},
        epochs=[int(epoch) for epoch in values["epochs"]],
        segments=None if segments is None else Segments(**_arrays(segments)),
        grid=None if grid is None else Grid(**_arrays(grid)),
        path=np.array(values["path"], float).reshape(-1, 2),
        average=(x, y, distance),
    )


def _arrays(fields: Any) -> Any:
    """Lists as arrays, also those in mappings; numbers as they are."""
    if isinstance(fields, dict):
        return {name: _arrays(value) for name, value in fields.items()}
    return np.array(fields, float) if isinstance(fields, list) else fields
