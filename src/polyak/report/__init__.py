"""Figures and pages of runs: the only package that draws, and it only draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "Band": "polyak.report.figures",
    "plot_budget": "polyak.report.figures",
    "plot_history": "polyak.report.figures",
    "plot_line": "polyak.report.figures",
    "plot_plane": "polyak.report.figures",
    "plot_rates": "polyak.report.figures",
    "plot_rays": "polyak.report.figures",
    "plot_reliability": "polyak.report.figures",
    "plot_results": "polyak.report.figures",
    "plot_schedule": "polyak.report.schedule",
    "plot_segments": "polyak.report.figures",
    "plot_scan": "polyak.report.scans",
    "save_scan": "polyak.report.scans",
    "write_comparison": "polyak.report.page",
    "write_report": "polyak.report.page",
    "write_search": "polyak.report.search",
}

if TYPE_CHECKING:
    from polyak.report.figures import Band as Band
    from polyak.report.figures import plot_budget as plot_budget
    from polyak.report.figures import plot_history as plot_history
    from polyak.report.figures import plot_line as plot_line
    from polyak.report.figures import plot_plane as plot_plane
    from polyak.report.figures import plot_rates as plot_rates
    from polyak.report.figures import plot_rays as plot_rays
    from polyak.report.figures import plot_reliability as plot_reliability
    from polyak.report.figures import plot_results as plot_results
    from polyak.report.figures import plot_segments as plot_segments
    from polyak.report.page import write_comparison as write_comparison
    from polyak.report.page import write_report as write_report
    from polyak.report.scans import plot_scan as plot_scan
    from polyak.report.scans import save_scan as save_scan
    from polyak.report.schedule import plot_schedule as plot_schedule
    from polyak.report.search import write_search as write_search

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
