"""The code in README.md and docs/*.md runs as tests, each page in an empty folder of its own."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser


def _enter(namespace: dict[str, Any]) -> None:
    folder = tempfile.TemporaryDirectory(prefix="polyak-docs-")
    namespace["_place"] = (Path.cwd(), folder)
    os.chdir(folder.name)


def _leave(namespace: dict[str, Any]) -> None:
    back, folder = namespace["_place"]
    os.chdir(back)
    folder.cleanup()
    import matplotlib.pyplot as plt

    plt.close("all")


# Its kernels need Triton, which comes with the CUDA builds of torch and has no build for all systems.
collect_ignore = [] if find_spec("triton") else ["src/polyak/tensors/kernels.py"]

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
