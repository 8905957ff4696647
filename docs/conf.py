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


def setup(app: Any) -> None:
    """Has an indented paragraph of a module's docstring shown as code, as in Markdown."""

    def mark_code(_app: Any, what: str, _name: str, _obj: Any, _opts: Any, lines: list[str]) -> None:
        for i in reversed(range(1, len(lines))):
            if what == "module" and lines[i].startswith("    ") and not lines[i - 1].strip():
                lines[i:i] = ["::", ""]

    app.connect("autodoc-process-docstring", mark_code)
