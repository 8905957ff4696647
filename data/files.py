"""Which files are read; and a file lock, so that one process writes what others wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet")


def file_suffix(path: Path) -> str | None:
    """Returns which of `SUFFIXES` the file has, whether or not .gz follows; None for another."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".settings.json"):  # what data/regenerate.py lays beside its output
        return None
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def readable_files(folder: Path) -> list[Path]:
    """Returns the files of `SUFFIXES` in a folder in sorted order; none if there is no folder."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in inside if file.is_file() and file_suffix(file))


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Tries to become the one process that holds `path`; yields whether it did.

    Args:
        path: Made if need be.
        wait: Until it is free.

    The system frees the lock when the process dies, however it dies, so none is ever left behind.
    """
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
