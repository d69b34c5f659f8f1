"""The parts of a run's page that show the surface around its solutions."""

from __future__ import annotations

from functools import partial

import numpy as np

from polyak.report import sentences
from polyak.report.drawing import Picture
from polyak.report.figures import plot_line, plot_plane, plot_rays, plot_segments
from polyak.report.measure import ERROR, LOSS, Landscape
from polyak.report.sections import Section

VALUES = {LOSS: "training loss (nats)", ERROR: "test error (%)"}


def landscape_sections(land: Landscape) -> list[Section]:
    """Line, rays, segments and plane."""
    sections = [_line(land), _rays(land)]
    if land.segments is not None:
        names = [str(epoch) for epoch in land.epochs]
        pictures = [
            Picture(
                f"segments-{key}",
                f"{label} along the segments between consecutive averaged weights",
                partial(
                    plot_segments,
                    positions=land.segments.positions,
                    values=land.segments.values[key],
                    names=names,
                    ylabel=label,
                ),
            )
            for key, label in VALUES.items()
        ]
        sentence = sentences.about_segments(land.segments, land.epochs)
        sections.append(Section("From checkpoint to checkpoint", sentence, pictures))
        if land.grid is not None:
            sections.append(_plane(land, sentences.about_plane(land, land.segments)))
    return sections


def _line(land: Landscape) -> Section:
    pictures = [
        Picture(
            f"line-{key}",
            f"{label} along the line from SGD's weights to the average",
            partial(
                plot_line,
                positions=land.line.positions,
                values=land.line.values[key],
                ylabel=label,
                ends=("SGD", "SWA"),
            ),
        )
        for key, label in VALUES.items()
    ]
    return Section("From SGD's solution to SWA's", sentences.about_line(land), pictures)


def _rays(land: Landscape) -> Section:
    distances = land.rays["SGD"].distances
    pictures = [
        Picture(
            f"rays-{key}",
            f"{label} along random rays from SGD, the last iterate and SWA",
            partial(
                plot_rays,
                distances=distances,
                values={name: rays.values[key] for name, rays in land.rays.items()},
                ylabel=label,
            ),
        )
        for key, label in VALUES.items()
    ]
    return Section("Along random rays", sentences.about_rays(land.rays), pictures)


def _plane(land: Landscape, sentence: str) -> Section:
    grid = land.grid
    points = {"averaged weights": land.path, "SWA": np.array([land.average[:2]])}
    pictures = [
        Picture(
            f"plane-{key}",
            f"{label} on the plane through the first, middle and last averaged weights",
            partial(
                plot_plane,
                x=grid.x,
                y=grid.y,
                values=grid.values[key],
                points=points,
                title=label,
            ),
            (4.2, 4.2),
        )
        for key, label in VALUES.items()
        if grid is not None
    ]
    title = "The plane through the first, the middle and the last"
    return Section(title, sentence, pictures)
