"""Files that are never half-written, and where they are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Writes text so that a reader, or a run after a kill, sees the old file or the whole new one.

    Args:
        path: Its folder is made if need be.
        text: UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_root(folder: str | Path | None = None) -> Path:
    """Returns `folder`, or l2r-drafter under $XDG_CACHE_HOME or ~/.cache."""
    if folder is not None:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "l2r-drafter"
