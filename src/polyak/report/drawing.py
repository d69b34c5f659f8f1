"""Drawing of pictures: SVG for the page, PNG for everything else.

The page shows one SVG in light and in dark: the foreground colour becomes `currentColor`, the
background stays transparent, and the colours of the curves are readable on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.errors import MissingExtra
from polyak.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#3987d6", "#e07b00", "#1f9e77", "#8a8f98"
PURPLE, PINK, BROWN = "#9a6bd6", "#d6558f", "#a9762f"
TEAL, RED, OLIVE = "#168ba0", "#cc5a45", "#7f8a1f"
"""Distinguishable for the colour-blind (Okabe and Ito's hues), at least 3:1 on white and #14171c."""

INK = "#1b1f24"  # only of lines and text in the foreground: the page makes it currentColor


@dataclass(frozen=True)
class Picture:
    """A picture: its name, its alt text, and how it is drawn."""

    name: str
    alt: str
    draw: Callable[[Axes], None]
    size_inches: tuple[float, float] = (4.2, 3.1)
    has_png: bool = True


@dataclass(frozen=True)
class Drawing:
    """A drawn picture: an `<svg>` element for a page, and a PNG on white."""

    picture: Picture
    svg: str
    png: bytes


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib with polyak's style file.

    Raises MissingExtra if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib import style as styles
    except ImportError as error:
        raise MissingExtra.of("matplotlib", "report", "Drawing") from error
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ink: dict[str, Any] = dict.fromkeys((*names, "legend.labelcolor", "axes.titlecolor"), INK)
    ink |= {"grid.color": INK, "grid.alpha": 0.15}
    with as_file(files("polyak.report") / "polyak.mplstyle") as path, mpl.rc_context():
        styles.use(path)
        for name, value in ink.items():
            mpl.rcParams[name] = value  # type: ignore[index] # the stubs list the names one by one
        yield


def draw(picture: Picture, prefix: str = "") -> Drawing:
    """Draw a picture for the page and as a PNG; the ids of the SVG begin with `prefix`."""
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=picture.size_inches)
        picture.draw(figure.add_subplot())
        vector, pixels = io.BytesIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(pixels, format="png")
    return Drawing(picture, _for_page(vector.getvalue().decode(), prefix), pixels.getvalue())


def write_png(drawing: Drawing, folder: Path) -> Path:
    """Write `<name>.png` into a folder, in place of an older one."""
    target = folder / f"{drawing.picture.name}.png"
    with replacing(target, overwrite=True) as part:
        part.write_bytes(drawing.png)
    return target


def _for_page(text: str, prefix: str) -> str:
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    # The page sets the width, the height follows from the viewBox.
    opening, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest
    return re.sub(r"\n\s*", "\n", text).strip()
