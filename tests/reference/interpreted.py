"""A pytest plugin: averages on the CPU are updated by the kernels of a GPU, which Triton interprets.

    TRITON_INTERPRET=1 pytest -p reference.interpreted ...

The run fails if the kernels were not used.
"""

from __future__ import annotations

import pytest

from polyak.tensors import fused

launched: dict[str, int] = {}


def pytest_configure(config):
    fused.DEVICES.add("cpu")
    run = fused.FusedRows._run

    def counting(self, name, n_programs, *rest):
        if n_programs:
            launched[name] = launched.get(name, 0) + 1
        run(self, name, n_programs, *rest)

    fused.FusedRows._run = counting


def pytest_sessionfinish(session):
    if not launched or fused._failures:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"launches: {launched}, failures: {fused._failures}")
