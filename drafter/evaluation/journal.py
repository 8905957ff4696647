"""A journal of finished measurements: one JSON line each, found again after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafter.files import write_atomic


class Journal:
    """Rows that are kept as they are made, in a file named by everything that determines them.

    Appended rows are on the disk when `add` returns. A line torn by a kill is dropped on opening.

    Args:
        folder: Of journals; None keeps rows in memory only.
        identity: Plain values; together the file's key, and its first line for people to read.
        fresh: Forget what is there.
        reading: Only read what is there; nothing is made.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        fresh: bool = False,
        reading: bool = False,
    ) -> None:
        text = json.dumps(identity, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:20]
        self.path = folder and folder / f"{key}.jsonl"
        self._rows: dict[str, Any] = {}
        if self.path is None or (reading and (fresh or not self.path.exists())):
            return
        if fresh or not self.path.exists():
            write_atomic(self.path, text + "\n")
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomic(self.path, whole)  # or the next row would be glued to the torn one
        for line in whole.splitlines()[1:]:
            row = json.loads(line)
            self._rows[row["key"]] = row["value"]

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def add(self, rows: Mapping[str, Any]) -> None:
        """Appends rows, all at once."""
        self._rows |= rows
        if self.path is None:
            return
        lines = "".join(json.dumps({"key": k, "value": v}) + "\n" for k, v in rows.items())
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
