"""Profiles and schedules, and both as text: functions of time, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "Profile": "polyak.maths.profile",
    "Schedule": "polyak.maths.schedules",
    "effective_samples": "polyak.maths.pieces",
    "format_profile": "polyak.maths.text",
    "parse_profile": "polyak.maths.text",
    "parse_schedule": "polyak.maths.text",
    "piece_weights": "polyak.maths.pieces",
}

if TYPE_CHECKING:
    from polyak.maths.pieces import effective_samples as effective_samples
    from polyak.maths.pieces import piece_weights as piece_weights
    from polyak.maths.profile import Profile as Profile
    from polyak.maths.schedules import Schedule as Schedule
    from polyak.maths.text import format_profile as format_profile
    from polyak.maths.text import parse_profile as parse_profile
    from polyak.maths.text import parse_schedule as parse_schedule

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
