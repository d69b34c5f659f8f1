"""A pytest plugin: averages on the CPU are updated by the kernels of a GPU, which Triton interprets.

    TRITON_INTERPRET=1 pytest -p reference.interpreted ...

The run fails if the kernels were not used.
"""

from __future__ import annotations

import re

import pytest

from polyak.tensors import fused

launched: dict[str, int] = {}

# A launch takes milliseconds here: of the laws only these, which every kind of profile and of tensor
# enters; all of a file whose tests are not named.
LAWS = {
    "test_it_is_the_weighted_sum_of_what_was_seen": "swa|slow ema|after",
    "test_saved_loaded_and_continued_is_bitwise_the_run_without_a_pause": "swa|slow ema",
    "test_constant_weights_are_a_fixed_point": "slow ema",
    "test_applied_gives_everything_back_to_the_bit": "^swa",
    "test_several_together_are_each_the_one_alone": "bfloat16",
    "test_short_drift": "",
    "test_a_block_is_folded_when_a_long_step_makes_the_share_large": "",
    "test_a_skipped_step_changes_nothing": "",
}
MODELS = "batchnorm|channels last|bfloat16|complex"


def pytest_configure(config):
    fused.DEVICES.add("cpu")
    call = fused.FusedRows._call

    def counting(self, launch, n_programs):
        if n_programs:
            launched[launch.kernel] = launched.get(launch.kernel, 0) + 1
        call(self, launch, n_programs)

    fused.FusedRows._call = counting


def _is_chosen(item):
    name, _, case = item.name.rstrip("]").partition("[")
    if item.path.name == "test_kernels.py":
        return True
    wanted = LAWS.get(name)
    if wanted is None or not re.search(wanted, case):
        return False
    return "make" not in getattr(item, "fixturenames", ()) or bool(re.search(MODELS, case))


def pytest_collection_modifyitems(items):
    items[:] = filter(_is_chosen, items)


def pytest_sessionfinish(session):
    if not launched or fused._failures:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"launches: {launched}, failures: {fused._failures}")
