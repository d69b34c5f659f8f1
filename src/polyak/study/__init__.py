"""Tools to judge an average: metrics, paired differences, flatness and planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "paired_bootstrap": "polyak.study.bootstrap",
    "Scored": "polyak.study.found",
    "ScaledNLL": "polyak.study.classify",
    "Found": "polyak.study.found",
    "Comparison": "polyak.study.found",
    "Command": "polyak.study.command",
    "Piece": "polyak.study.plan",
    "Plan": "polyak.study.plan",
    "Plane": "polyak.study.landscape",
    "Segments": "polyak.study.landscape",
    "Portion": "polyak.study.soup_found",
    "Soup": "polyak.study.soup_found",
    "Surface": "polyak.study.surface",
    "Trajectory": "polyak.study.trajectory",
    "make_soup": "polyak.study.soup",
    "along_line": "polyak.study.landscape",
    "along_rays": "polyak.study.landscape",
    "along_segments": "polyak.study.landscape",
    "on_plane": "polyak.study.landscape",
}

if TYPE_CHECKING:
    from polyak.study.bootstrap import paired_bootstrap as paired_bootstrap
    from polyak.study.classify import ScaledNLL as ScaledNLL
    from polyak.study.command import Command as Command
    from polyak.study.found import Comparison as Comparison
    from polyak.study.found import Found as Found
    from polyak.study.found import Scored as Scored
    from polyak.study.landscape import Plane as Plane
    from polyak.study.landscape import Segments as Segments
    from polyak.study.landscape import along_line as along_line
    from polyak.study.landscape import along_rays as along_rays
    from polyak.study.landscape import along_segments as along_segments
    from polyak.study.landscape import on_plane as on_plane
    from polyak.study.plan import Piece as Piece
    from polyak.study.plan import Plan as Plan
    from polyak.study.soup import make_soup as make_soup
    from polyak.study.soup_found import Portion as Portion
    from polyak.study.soup_found import Soup as Soup
    from polyak.study.surface import Surface as Surface
    from polyak.study.trajectory import Trajectory as Trajectory

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
