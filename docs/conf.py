"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the packages that the API pages describe

project = "l2r-drafter"
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_show_copyright = False
myst_heading_anchors = 3  # pages link to headings as they do on GitHub
default_role = "code"  # `name` in a docstring

apidoc_modules = [
    {
        "path": f"../{name}",
        "destination": f"api/{name}",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members"},
    }
    for name in ("losses", "drafter", "data", "callbacks")
]
autodoc_default_options = {"ignore-module-all": True}  # each name on the page of its own module
autodoc_member_order = "bysource"
napoleon_use_ivar = True
exclude_patterns = ["_build", "api/*/modules.rst"]


MARKED_BY_COLON = ("attribute", "data", "property")
"""Of these napoleon takes what stands before a colon for a type; here it is text."""


def setup(app: Any) -> None:
    """Keeps docstrings as they are meant; Sphinx calls this."""
    kept: dict[str, list[str]] = {}

    def keep(_app: Any, what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
        if what in MARKED_BY_COLON:
            kept[name] = list(lines)
        for i in reversed(range(1, len(lines))):  # an indented paragraph is code, as in Markdown
            if what == "module" and lines[i].startswith("    ") and not lines[i - 1].strip():
                lines[i:i] = ["::", ""]

    def put_back(_app: Any, what: str, name: str, _obj: Any, _opts: Any, lines: list[str]) -> None:
        if what in MARKED_BY_COLON:
            lines[:] = kept.pop(name)

    app.connect("autodoc-process-docstring", keep, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-docstring", put_back, priority=600)
