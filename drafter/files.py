"""Files that are never half-written, where they are kept, and a lock on one."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HASHED_BYTES = 1 << 26
"""`file_stamp` hashes files up to this size whole; of larger ones size, head and tail."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file: a reader, or a run after a kill, sees the old one or the whole new one.

    Args:
        path: Its folder is made if need be.
        content: Bytes, or text to be written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file aside, flushes it, and gives it its name.

    Args:
        path: Its folder is made if need be.
        write: Writes the path that it is given; for files too large to hold in memory twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Flushes a folder: a rename itself must survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _piece(folder: Path, stem: str, suffix: str, n: int) -> Path:
    return folder / (f"{stem}.resume-{n}{suffix}" if n else f"{stem}{suffix}")


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """Returns folder/stem.suffix, or folder/stem.resume-<n>.suffix with the first free n."""
    n = 0
    while _piece(folder, stem, suffix, n).exists():
        n += 1
    return _piece(folder, stem, suffix, n)


def pieces(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Returns a run's files of the names that `free_path` gives, in the order of its pieces."""
    most = 1 + len(list(folder.glob("*")))
    files = [_piece(folder, stem, suffix, n) for n in range(most)]
    return [file for file in files if file.is_file()]


def cache_root(folder: str | Path | None = None) -> Path:
    """Returns `folder`, or l2r-drafter under $XDG_CACHE_HOME or ~/.cache."""
    if folder is not None:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "l2r-drafter"


def local_copy(source: str) -> str:
    """Returns the path of "preset:NAME=PATH" (see data/presets.py), any other source as it is."""
    head, _, path = source.partition("=")
    return str(Path(path).expanduser()) if head.startswith("preset:") and path else source


@functools.cache
def file_stamp(path: str) -> str:
    """Returns a short hash of what a file or folder holds; of its name where it is not local.

    Args:
        path: A file is hashed whole up to HASHED_BYTES; of a larger one, and of the files of a
            folder, size, head and tail are.
    """
    where = Path(path)
    digest = hashlib.sha256()
    if where.is_dir():
        for file in sorted(where.iterdir()):
            if file.is_file():
                digest.update(f"{file.name} {_ends(file, 1 << 20)}".encode())
    elif where.is_file():
        digest.update(_ends(where, HASHED_BYTES).encode())
    else:
        digest.update(path.encode())
    return digest.hexdigest()[:16]


def _ends(file: Path, most: int) -> str:
    """Returns a hash of a file's size, its first `most` bytes and its last `most`."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        digest.update(content.read(most))
        if size > most:
            content.seek(-min(most, size - most), os.SEEK_END)
            digest.update(content.read())
    return digest.hexdigest()


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Tries to become the one process that holds `path`; yields whether it did.

    Args:
        path: Made if need be, with its folder.
        wait: Until it is free.

    The system frees the lock when the process dies, however it dies, so none is ever left behind.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # a forked child may have the file open still
            fcntl.flock(file, fcntl.LOCK_UN)
