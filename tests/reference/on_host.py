"""A pytest plugin: averages that name no device are kept on the host.

pytest -p reference.on_gpu -p reference.on_host tests/laws/test_averages.py
"""

from __future__ import annotations

import torch

from polyak.averaging import tracker


def pytest_configure(config):
    named = tracker._device
    tracker._device = lambda given: torch.device("cpu") if given is None else named(given)
