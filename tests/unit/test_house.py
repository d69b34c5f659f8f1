"""What holds for every module: no import circles, files are small, and one place writes them."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "polyak"
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.fixture(scope="module")
def rooms():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "scripts" / "draw_rooms.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_no_module_is_in_an_import_circle(rooms):
    # At module level, and those for type checkers too: a circle there is one idea in two files.
    found = rooms.modules()
    graph = {name: rooms.imports(name, found, inside_functions=False) for name in found}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_room_imports_only_from_rooms_below_it(rooms):
    rising = {
        pair: reasons
        for pair, reasons in rooms.room_imports(rooms.modules()).items()
        if rooms.ROOMS.index(pair[0]) > rooms.ROOMS.index(pair[1])
    }
    assert not rising


def test_the_picture_of_the_rooms_is_of_these_imports(rooms):
    drawn = rooms.PICTURE.read_text(encoding="utf-8")
    assert drawn == rooms.picture(rooms.modules()), "run python scripts/draw_rooms.py"


def test_the_page_about_the_house_names_what_is_there():
    page = (ROOT / "docs" / "how-polyak-is-built.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| `(\S+\.py)` \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert len(steps) > 15
    for name, defined in steps:
        tree = ast.parse((SOURCE / name).read_text(encoding="utf-8"))
        assert defined in {getattr(node, "name", None) for node in tree.body}, f"{name}: {defined}"
    for path in re.findall(r"`((?:src|tests|docs|scripts|polyak)/\S+?\.(?:py|md))`", page):
        assert (ROOT / path).exists() or (ROOT / "src" / path).exists(), path


@pytest.mark.parametrize(
    "path", sorted((SOURCE / "integrations").glob("*.py")), ids=lambda p: p.stem
)
def test_an_adapter_uses_only_what_everybody_can(path):
    # What an adapter needs from the inside, somebody else's adapter would lack.
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    inside = {name for name in found if name.startswith("polyak.")}
    own = {name for name in inside if name.startswith("polyak.integrations")}
    assert inside - own <= {"polyak.errors", "polyak.sharded"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_holds_one_idea(path):
    # One law table each, read from top to bottom.
    larger = path in (SOURCE / "maths" / "profiles.py", SOURCE / "maths" / "schedules.py")
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (600 if larger else 500)


def test_an_average_loads_no_reader_of_files():
    code = (
        "import sys, torch, polyak; model = torch.nn.Linear(2, 2); "
        "average = polyak.Average(model, polyak.EMA(decay=0.9)); average.update(); "
        "loaded = [name for name in sys.modules if name.startswith('polyak.checkpoints.reading')]; "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Files appear whole or not at all, because `files.replacing` writes them beside, syncs and moves
# them. What is written in any other way is named here, with what makes it safe.
WRITERS_OF_THEIR_OWN = {
    ("files.py", "part.touch"): "the one place",
    (
        "checkpoints/writing/layouts.py",
        "os.open",
    ): "streams into a staging folder, moved at the end",
    ("checkpoints/merging/outputs.py", "write_bytes"): "in that staging folder",
    ("checkpoints/merging/execute.py", "touch"): "in that staging folder, when all of it is synced",
    ("checkpoints/merging/journal.py", "os.open"): "the journal and lock of the staging folder",
    ("integrations/accelerate.py", "torch.save"): "a part of the checkpoint that Accelerate writes",
    (
        "integrations/trainer_checkpoint.py",
        "torch.save",
    ): "a part of the checkpoint that the Trainer writes",
    ("reference_run/run.py", "open"): "the lock of a run's folder",
    ("reference_run/leg_checkpoint.py", "torch.save"): "into memory, to be hashed",
    ("report/scans.py", "figure.savefig"): "into memory, to be written whole",
    ("report/drawing.py", "figure.savefig"): "into memory, to be put into the page",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_files_py_opens_a_file_for_writing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    safe = _calls_in_replacing(tree)
    allowed = [c for name, c in WRITERS_OF_THEIR_OWN if SOURCE / name == path]
    for call in _writing_calls(tree):
        name = ast.unparse(call.func)
        assert call in safe or name.endswith(tuple(allowed)), f"line {call.lineno}: {name}"


def _writing_calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _writes(node)]


def _writes(call: ast.Call) -> bool:
    whole = ast.unparse(call.func)
    name = whole.rpartition(".")[2]
    if name in ("write_text", "write_bytes", "touch", "savefig", "save_file", "mkstemp"):
        return True
    if whole in ("torch.save", "np.save", "np.savez", "shutil.copy", "shutil.copyfile"):
        return True
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    flags = "".join(ast.unparse(argument) for argument in given)
    writes = any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
    return name in ("open", "fdopen", "ZipFile") and (
        writes or "O_CREAT" in flags or "O_RDWR" in flags
    )


def _calls_in_replacing(tree: ast.AST) -> set[ast.Call]:
    """The calls that get the path which `with replacing(...) as part` gives."""
    safe = set()
    for block in ast.walk(tree):
        for item in block.items if isinstance(block, ast.With) else ():
            if item.optional_vars and ast.unparse(item.context_expr).startswith("replacing("):
                part = ast.unparse(item.optional_vars)
                calls = [n for n in ast.walk(block) if isinstance(n, ast.Call)]
                safe |= {c for c in calls if any(_is_name(n, part) for n in ast.walk(c))}
    return safe


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def test_the_pages_bring_what_draws_their_formulas():
    """Documentation is read without a network too."""
    found = {}
    exec((ROOT / "docs" / "conf.py").read_text(), found)
    script = ROOT / "docs" / found["html_static_path"][0] / found["mathjax_path"]
    assert script.stat().st_size > 1_000_000  # with its fonts
    assert script.with_name("LICENSE").is_file()
