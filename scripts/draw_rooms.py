"""Draw which part of polyak imports which, from the imports: `python scripts/draw_rooms.py`.

Writes docs/images/rooms.svg for docs/how-polyak-is-built.md; `--list` prints the imports between the
rooms instead, with the modules that make them. Equal sources give equal bytes, so a test can tell
when the picture is out of date.
"""

from __future__ import annotations

import ast
import itertools
import sys
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

# From top to bottom. A room imports only from rooms below it; an arrow that rises is drawn in red.
ROOMS = (
    "cli",
    "integrations",
    "report",
    "reference_run",
    "uncertainty",
    "study",
    "swa_utils",
    "sharded",
    "averaging",
    "batchnorm",
    "checkpoints",
    "checkpoints.merging",
    "checkpoints.writing",
    "checkpoints.reading",
    "tensors",
    "maths",
    "ground floor",
)
GROUND = {"errors", "files", "objects", "version"}
FACE = {"polyak", "polyak.__main__", "polyak.schedules"}  # names that are only handed on

MARGIN, WIDTH, BOX, LINE, GAP, PAD = 8, 760, 570, 17, 10, 9
COLOURS = ("#1f5fa8", "#b0541e", "#2c7a4b", "#8a3d8f", "#5b6470")


def modules(source: Path = ROOT / "src") -> dict[str, Path]:
    """Every module of polyak: dotted name to file."""
    paths = (path.relative_to(source) for path in sorted(source.rglob("polyak/**/*.py")))
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): source / path
        for path in paths
    }


def imports(name: str, found: dict[str, Path], *, inside_functions: bool) -> set[str]:
    """The modules of polyak that a module imports, those for type checkers included."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(found[name].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {path if path in found else str(node.module) for path in whole.values()}
        todo.extend(ast.iter_child_nodes(node))
    return names & found.keys()


def room_of(module: str) -> str:
    """The room a module belongs to: its package, but `checkpoints` has three of its own."""
    parts = module.split(".")[1:]
    if parts[0] in GROUND:
        return "ground floor"
    return next(room for n in (2, 1) if (room := ".".join(parts[:n])) in ROOMS)


def room_imports(found: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    """(importing room, imported room) to the imports between them, as `module -> module`."""
    edges: dict[tuple[str, str], list[str]] = {}
    for name in sorted(found.keys() - FACE):
        for other in sorted(imports(name, found, inside_functions=True) - FACE):
            if (pair := (room_of(name), room_of(other))) and pair[0] != pair[1]:
                edges.setdefault(pair, []).append(f"{name} -> {other}")
    return edges


def without_implied(edges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges but for those that a path of others stands for, in the order of the rooms."""
    order = ROOMS.index
    falling = {edge for edge in edges if order(edge[0]) < order(edge[1])}
    reached = set(falling)
    for via, start, end in itertools.product(ROOMS, repeat=3):  # Warshall: `via` is outermost
        if (start, via) in reached and (via, end) in reached:
            reached.add((start, end))
    implied = {(a, b) for a, b in falling for r in ROOMS if {(a, r), (r, b)} <= reached}
    return sorted(edges - implied, key=lambda edge: (order(edge[0]), order(edge[1])))


def picture(found: dict[str, Path]) -> str:
    """The SVG."""
    boxes: dict[str, tuple[float, float]] = {}  # room to its top and height
    body: list[str] = []
    y: float = MARGIN
    for room in ROOMS:
        height, lines = _box(room, y, found)
        boxes[room] = (y, height)
        body += lines
        y += height + GAP
    body += _arrows(without_implied(set(room_imports(found))), boxes)
    size = f'width="{WIDTH}" height="{y:.0f}" viewBox="0 0 {WIDTH} {y:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif">',
            "<title>The rooms of polyak: each imports only from rooms below it</title>",
            f'<rect width="{WIDTH}" height="{y:.0f}" rx="8" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _box(room: str, top: float, found: dict[str, Path]) -> tuple[float, list[str]]:
    """Its height and its elements: name, what it is for, what is in it."""
    inside = sorted(name for name in found.keys() - FACE if room_of(name) == room)
    package = f"polyak.{room}"
    about = "What every room may use."
    if package in found:
        docstring = ast.get_docstring(ast.parse(found[package].read_text(encoding="utf-8")))
        about = str(docstring).partition("\n")[0].replace("`", "")
    listed = ", ".join(name.rpartition(".")[2] for name in inside if name != package)
    texts = [(line, 'font-size="13" fill="#2b3138"') for line in textwrap.wrap(about, 82)]
    texts += [(line, 'font-size="12" fill="#6a737d"') for line in textwrap.wrap(listed, 86)]
    height = PAD * 2 + LINE * (len(texts) + 1)
    x, base = MARGIN + PAD, top + PAD + 12
    place = f'x="{MARGIN}" y="{top:.0f}" width="{BOX}" height="{height}"'
    lines = [
        f'<rect {place} rx="5" fill="#f4f6f8" stroke="#c3cad2"/>',
        f'<text x="{x}" y="{base:.0f}" font-size="14" font-weight="bold" fill="#11161c">{room}</text>',
    ]
    for n, (text, style) in enumerate(texts, start=1):
        lines.append(f'<text x="{x}" y="{base + LINE * n:.0f}" {style}>{escape(text)}</text>')
    return height, lines


def _arrows(edges: list[tuple[str, str]], boxes: dict[str, tuple[float, float]]) -> Iterator[str]:
    """Curves on the right: out of a box's lower half, into the upper half of another."""
    order, right = ROOMS.index, MARGIN + BOX
    for start, end in edges:
        # The nearest of several is the innermost, so that curves of one box do not cross.
        leaving = sorted((e for s, e in edges if s == start), key=order, reverse=True)
        entering = sorted((s for s, e in edges if e == end), key=order, reverse=True)
        y0 = _port(boxes[start], leaving.index(end), len(leaving), half=1)
        y1 = _port(boxes[end], entering.index(start), len(entering), half=0)
        bulge = 26 + 22 * abs(order(end) - order(start))
        colour = COLOURS[order(start) % len(COLOURS)] if order(start) < order(end) else "#d1242f"
        x1 = right + 7
        path = f"M{right} {y0:.1f} C{right + bulge} {y0:.1f} {x1 + bulge} {y1:.1f} {x1} {y1:.1f}"
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        head = f"{right},{y1:.1f} {right + 9},{y1 - 4:.1f} {right + 9},{y1 + 4:.1f}"
        yield f'<polygon points="{head}" fill="{colour}"><title>{start} imports {end}</title></polygon>'


def _port(box: tuple[float, float], index: int, count: int, *, half: int) -> float:
    top, height = box
    return top + height / 2 * (half + (index + 1) / (count + 1))


def main() -> None:
    found = modules()
    if "--list" in sys.argv[1:]:
        for (start, end), reasons in sorted(room_imports(found).items()):
            print(f"{start} -> {end}", *reasons, sep="\n    ")
        return
    PICTURE.write_text(picture(found), encoding="utf-8")
    print(f"drawn in {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
