"""A pytest plugin: the models of tests that name no device are made on the GPU.

pytest -p reference.on_gpu tests/laws/test_averages.py
"""

from __future__ import annotations

import torch


def pytest_configure(config):
    torch.set_default_device("cuda")
