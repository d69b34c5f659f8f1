"""The names that `polyak` hands on: few, importable, typed, documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import polyak

ROOT = Path(__file__).parents[2]
NAMES = [name for name in polyak.__all__ if not name.startswith("__")]


def test_they_are_few():
    assert len(NAMES) <= 30


@pytest.mark.parametrize("name", NAMES)
def test_each_is_there_documented_and_in_the_reference(name):
    value = getattr(polyak, name)
    assert value.__doc__, name
    assert value.__doc__.strip().splitlines()[0].endswith((".", ":")), value.__doc__
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"polyak\.{name}\b|automodule:: {value.__module__}\n", reference), name


@pytest.mark.parametrize("name", NAMES)
def test_type_checkers_see_what_is_loaded_lazily(name):
    source = Path(polyak.__file__).read_text(encoding="utf-8")
    home = polyak._HOME_OF[name]
    assert f"from {home} import {name} as {name}\n" in source


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="no attribute 'Swa'"):
        polyak.Swa  # noqa: B018


# How polyak is built is for whoever changes it, and names modules.
PAGES = {*(ROOT / "docs").glob("*.md"), ROOT / "README.md"} - {
    ROOT / "docs" / "how-polyak-is-built.md"
}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.stem)
def test_no_documented_path_is_deeper_than_two(page):
    text = page.read_text(encoding="utf-8")
    imported = re.findall(r"(?:from|import) (polyak(?:\.\w+)*)", text)
    documented = re.findall(r"\.\. auto\w+:: (polyak(?:\.\w+)*)\.\w+", text)
    # An adapter is named after its framework, below the package of all adapters.
    paths = [path.replace("polyak.integrations.", "polyak.") for path in imported + documented]
    assert not [path for path in paths if path.count(".") > 1]


@pytest.mark.parametrize(
    "name", ["lightning.WeightAveraging", "transformers.attach", "accelerate.track"]
)
def test_adapters_are_there_after_import_polyak(name):
    code = f"import polyak; print(polyak.integrations.{name}.__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == name.partition(".")[2]
    with pytest.raises(AttributeError, match="keras"):
        _ = polyak.integrations.keras
