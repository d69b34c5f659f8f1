"""Tools to judge an average: metrics, paired differences, flatness and planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "OverfitWindow": "polyak.maths.overfit_window",
    "two_tailed": "polyak.study.steered",
    "swad": "polyak.study.steered",
    "Curve": "polyak.study.curves",
    "connect": "polyak.study.curves",
    "Curvature": "polyak.study.curvature",
    "lanczos": "polyak.study.curvature",
    "hessian_eigenvalues": "polyak.study.curvature",
    "Barrier": "polyak.study.scans",
    "RayScan": "polyak.study.scans",
    "PlaneScan": "polyak.study.scans",
    "LineScan": "polyak.study.scans",
    "named_points": "polyak.study.principal",
    "scan_rays": "polyak.study.scanning",
    "scan_plane": "polyak.study.scanning",
    "scan_line": "polyak.study.scanning",
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
    from polyak.maths.overfit_window import OverfitWindow as OverfitWindow
    from polyak.study.bootstrap import paired_bootstrap as paired_bootstrap
    from polyak.study.classify import ScaledNLL as ScaledNLL
    from polyak.study.command import Command as Command
    from polyak.study.curvature import Curvature as Curvature
    from polyak.study.curvature import hessian_eigenvalues as hessian_eigenvalues
    from polyak.study.curvature import lanczos as lanczos
    from polyak.study.curves import Curve as Curve
    from polyak.study.curves import connect as connect
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
    from polyak.study.principal import named_points as named_points
    from polyak.study.scanning import scan_line as scan_line
    from polyak.study.scanning import scan_plane as scan_plane
    from polyak.study.scanning import scan_rays as scan_rays
    from polyak.study.scans import Barrier as Barrier
    from polyak.study.scans import LineScan as LineScan
    from polyak.study.scans import PlaneScan as PlaneScan
    from polyak.study.scans import RayScan as RayScan
    from polyak.study.soup import make_soup as make_soup
    from polyak.study.soup_found import Portion as Portion
    from polyak.study.soup_found import Soup as Soup
    from polyak.study.steered import swad as swad
    from polyak.study.steered import two_tailed as two_tailed
    from polyak.study.surface import Surface as Surface
    from polyak.study.trajectory import Trajectory as Trajectory

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
