"""A pytest plugin: averages are updated in the background, as those of a GPU's weights on the host are.

pytest -p reference.in_background tests/laws/test_averages.py
"""

from __future__ import annotations

import time
from contextlib import contextmanager

from polyak.averaging import offload, tracker
from polyak.tensors import ahead, blend


def slowly(job):
    """What comes later has time to arrive too early."""
    time.sleep(0.001)
    return job()


@contextmanager
def background(*, of=lambda live, device: True, delay=slowly, ring_bytes=1 << 12, group_values=100):
    """Every average made in the block, in small pieces and with a late thread."""
    work = offload.Background._work
    there = [
        (tracker, "in_background", of),
        (ahead, "_NBYTES", ring_bytes),
        (blend, "_GROUP_VALUES_READ", group_values),
        (offload.Background, "_work", lambda self, job: delay(lambda: work(self, job))),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in there]
    for holder, name, value in there:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def pytest_configure(config):
    config._background = background()
    config._background.__enter__()


def pytest_unconfigure(config):
    config._background.__exit__(None, None, None)
