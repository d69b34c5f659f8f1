"""Sphinx: MyST pages, furo, warnings are errors (scripts/check docs)."""

import re
from typing import Any

project = "polyak"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = "polyak"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_static"]
html_static_path = ["_static"]
# MathJax 3.2.2 with its fonts in one file, beside the pages: formulas need no network.
mathjax_path = "mathjax/tex-svg.js"
default_role = "code"  # a single backtick in a docstring is code, as in Markdown
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "__init__, __new__"}


def _markdown_math(
    app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings write formulas as Markdown does, between dollars; Sphinx reads its own markup."""
    text = "\n".join(lines)
    text = re.sub(r"\$\$(.+?)\$\$", _display, text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w`$])\$([^$`\n]+(?:\n[^$`\n]+)?)\$(?![\w`])", r":math:`\1`\\ ", text)
    lines[:] = text.split("\n")


def _display(match: re.Match[str]) -> str:
    formula = " ".join(match[1].split())
    return f"\n\n.. math:: {formula}\n\n"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _markdown_math)
