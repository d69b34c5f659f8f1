"""One colour for one meaning, in all pictures: the colour of a line follows from what the legend calls it.

Averages have a colour each, and so have the iterates they are made of and the annealed runs they are compared
with. What has none of these meanings is drawn in grey or in the ink of the page: paths through weight space,
candidates of a search, references.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from polyak.report.drawing import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    TEAL,
)

MEANINGS = (
    ("iterates of the cyclic arm", r"cyclic.*(iterate|weights)|(iterate|weights).*cyclic", BROWN),
    ("iterates that averages are made of", r"iterate|averaged weights|\bSWA LR", BLUE),
    ("power EMA", r"\bpower EMA", TEAL),
    ("WSM", r"\bWSM\b", RED),
    ("EMA", r"\bEMA\b", GREEN),
    ("SWA", r"\bSWA\b", ORANGE),
    ("a run annealed in half the length", r"\bhalf\b(?!-)", PINK),
    ("a run annealed in a quarter of the length", r"\bquarter\b", OLIVE),
    ("the annealed run", r"^SGD\b|^cosine\b|\bannealed\b|\bBase LR", PURPLE),
)
"""What is meant, how its names in legends are recognised, and its colour. The first that matches counts."""

_DASHES = {PURPLE: "--", PINK: "--", OLIVE: "--", TEAL: "-."}


def colour_of(name: str) -> str:
    """The colour of what a legend calls so; grey if the name has no meaning in the table.

    >>> colour_of("SWA arm, EMA") == colour_of("its EMA"), colour_of("SWA arm, last iterate") == colour_of("iterate")
    (True, True)
    """
    found = (colour for _, names, colour in MEANINGS if re.search(names, name, flags=re.IGNORECASE))
    return next(found, GREY)


def dashes_of(name: str) -> str:
    """How the line is drawn that has a name's colour: annealed runs dashed, the power EMA unlike the EMA."""
    return _DASHES.get(colour_of(name), "-")


def distinct_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of some names, which may be anyone's: what has no meaning gets what is left."""
    known = {name: colour_of(name) for name in names}
    left = itertools.cycle(
        [colour for _, _, colour in MEANINGS if colour not in known.values()] or [GREY]
    )
    return {name: next(left) if found == GREY else found for name, found in known.items()}
