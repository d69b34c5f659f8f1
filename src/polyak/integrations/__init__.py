"""Averages inside the frameworks that train: one file per framework, made of the public API.

`import polyak` is enough for all of them: `polyak.integrations.lightning` is imported when it is named.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in ("accelerate", "lightning", "transformers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
