"""A file lock, so that one process writes what others wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
