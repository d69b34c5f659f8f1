"""Lightning's own tests of its averaging callback, with polyak's behind its names.

    git -C path/to/pytorch-lightning show HEAD:tests/tests_pytorch/callbacks/test_weight_averaging.py > FILE
    python benchmarks/lightning_tests.py FILE [-k expression]

The file belongs to Lightning and is read where it lies. Prints what passed; all do but the test that demands a
deep-copied second module, which polyak does not keep. Those that start processes take minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / "peers" / "lightning_stand_in.py"
BY_DESIGN = {"test_weight_averaging_deepcopy"}


class Tally:
    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome].append(report.nodeid.rpartition("::")[2])


def substituted(source: str) -> str:
    ours = "from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging"
    assert ours in source, "this is not the test file that was meant"
    source = source.replace(
        ours, "from lightning_stand_in import EMAWeightAveraging, WeightAveraging"
    )
    helper = "from tests_pytorch.helpers.runif import RunIf"
    return source.replace(helper, "from lightning_stand_in import RunIf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("-k", default="")
    options = parser.parse_args()
    tally = Tally()
    sys.path.insert(0, str(STAND_IN.parent))
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder) / "test_substituted.py"
        test.write_text(substituted(options.file.read_text(encoding="utf-8")), encoding="utf-8")
        sys.path.insert(0, folder)
        pytest.main(
            [
                str(test),
                "-q",
                "-k",
                options.k,
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore",
                "-c",
                "/dev/null",
            ],
            plugins=[tally],
        )
    for outcome, names in tally.outcomes.items():
        print(f"{outcome}: {len(names)} {', '.join(names) if outcome != 'passed' else ''}")
    return len(set(tally.outcomes["failed"]) - BY_DESIGN)


if __name__ == "__main__":
    sys.exit(main())
