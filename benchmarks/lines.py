"""Results as JSON lines: written whole after every row, so that several short runs add up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter.files import write_atomic


def read_lines(output: Path | None) -> list[dict[str, Any]]:
    """Returns the rows that are there; none without a file."""
    if output is None or not output.exists():
        return []
    return list(map(json.loads, output.read_text().splitlines()))


def write_lines(output: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Puts rows in the place of what is there; nothing if no file is asked for."""
    if output is not None:
        write_atomic(output, "".join(json.dumps(row) + "\n" for row in rows))
