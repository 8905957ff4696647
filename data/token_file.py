"""A stream's rows, tokenised once into files on disk as they arrive, then read by memory map.

A folder `tokens-<key>/` holds `index.json` and chunks `chunk-00000.safetensors`, each with the rows
of one stretch of the source: `ids` int32 (T,), `supervised` bool (T,), `offsets` int64 (R+1,) where
rows begin, `sample_ids` int64 (R,), and as metadata how many source rows had been read by its end
and the report up to there. A chunk is written aside, flushed to disk and renamed, so a kill at
any moment leaves whole chunks only, and the next run goes on after the last. All that the tokens
depend on is in the key: another template, length or tokenizer is another folder, and a folder
opened with another key is refused.

One process writes, holding a lock that its death releases; the others wait for the finished index
by looking at the file, not in a collective that would time out.
Legend: R rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.rows import RowReport, RowSet, TokenRow
from data.sources import SourceRow
from drafter.errors import UserError
from drafter.files import lock, write_atomic

FORMAT = 1
INDEX = "index.json"
CHUNK_TOKENS = 1 << 22
CHUNK_SECONDS = 60.0  # at most this much work is lost by a kill
POLL_SECONDS = 0.5

Key = dict[str, Any]
OpenRows = Callable[[int], Iterable[SourceRow]]
Tokenise = Callable[[SourceRow, RowReport], TokenRow | None]


def folder_for(cache_dir: Path, key: Key) -> Path:
    """Returns the folder of the tokens with this key."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return cache_dir / f"tokens-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def load_or_build(
    folder: Path,
    key: Key,
    open_rows: OpenRows,
    tokenise: Tokenise,
    *,
    source: str,
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_seconds: float = CHUNK_SECONDS,
) -> RowSet:
    """Returns the finished token file, writing it (or the rest of it) first if nobody else does.

    Args:
        folder: where it lies; made if missing.
        key: what the tokens depend on, plain JSON values.
        open_rows: gives the source's rows from an index on.
        tokenise: turns a row into tokens and counts what it leaves out.
        source: the source's name, for the report.
        chunk_tokens: a chunk is closed at this many tokens,
        chunk_seconds: or after so many seconds.

    Raises:
        UserError: the folder was written with another key, or a file of it is damaged.
    """
    waiting = False
    while not _is_complete(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / "lock") as mine:
            if mine and not _is_complete(folder, key):
                writer = _Writer(folder, key, source, chunk_tokens, chunk_seconds)
                writer.run(open_rows, tokenise)
        if not mine:
            if not waiting:
                print(f"waiting for another process to tokenise {source} into {folder}", flush=True)
            waiting = True
            time.sleep(POLL_SECONDS)
    return open_tokens(folder, key)


def open_tokens(folder: Path, key: Key | None = None) -> RowSet:
    """Opens a finished token file.

    Args:
        folder: where it lies.
        key: what it must have been written with; None accepts any.

    Raises:
        UserError: it is missing, unfinished or damaged, or a field of its key differs (named).
    """
    index = _read_index(folder, key)
    if index is None or not index["complete"]:
        raise UserError(f"{folder}: no finished token file here")
    for chunk in index["chunks"]:
        path = folder / chunk["file"]
        size = path.stat().st_size if path.exists() else 0
        if size != chunk["bytes"]:
            raise UserError(
                f"{path}: {chunk['bytes'] - size} of {chunk['bytes']} bytes are missing; delete "
                f"the folder {folder}, and the next run writes it again"
            )
    rows = TokenFile(folder, [(chunk["file"], chunk["rows"]) for chunk in index["chunks"]])
    return RowSet(rows, RowReport.from_dict(index["report"]))


class TokenFile(Sequence[TokenRow]):
    """The rows of a finished token file; each is read when asked for.

    Args:
        folder: where the chunks lie.
        chunks: (file name, rows) in order.
    """

    def __init__(self, folder: Path, chunks: Sequence[tuple[str, int]]) -> None:
        self._folder = folder
        self._files = [name for name, _ in chunks]
        self._ends = list(accumulate(rows for _, rows in chunks))
        self._opened: dict[int, tuple[Any, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | Sequence[TokenRow]:
        """Returns a row, or a list of rows for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        (file, offsets, sample_ids), row = self._find(index)
        span = slice(int(offsets[row]), int(offsets[row + 1]))
        return TokenRow(
            int(sample_ids[row]),
            file.get_slice("ids")[span],
            file.get_slice("supervised")[span],
        )

    def tokens(self, index: int) -> int:
        """Returns a row's length."""
        (_, offsets, _), row = self._find(index)
        return int(offsets[row + 1] - offsets[row])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files behind: each worker opens its own."""
        return {**self.__dict__, "_opened": {}}

    def _find(self, index: int) -> tuple[tuple[Any, np.ndarray, np.ndarray], int]:
        """Returns the open chunk that a row is in, and the row's place there."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        chunk = bisect_right(self._ends, place)
        return self._open(chunk), place - (self._ends[chunk - 1] if chunk else 0)

    def _open(self, chunk: int) -> tuple[Any, np.ndarray, np.ndarray]:
        if chunk not in self._opened:
            file = _open_chunk(self._folder / self._files[chunk])
            self._opened[chunk] = (file, file.get_tensor("offsets"), file.get_tensor("sample_ids"))
        return self._opened[chunk]


class _Writer:
    """Writes chunks until the source ends, beginning after those that are there."""

    def __init__(
        self, folder: Path, key: Key, source: str, chunk_tokens: int, chunk_seconds: float
    ) -> None:
        self.folder = folder
        self.key = key
        self.chunk_tokens = chunk_tokens
        self.chunk_seconds = chunk_seconds
        self.report = RowReport(source)
        self.chunks: list[dict[str, Any]] = []
        self.next_row = 0
        self._resume()

    def run(self, open_rows: OpenRows, tokenise: Tokenise) -> None:
        rows: list[TokenRow] = []
        tokens, begun, first = 0, time.monotonic(), self.next_row
        for source_row in open_rows(self.next_row):
            row = tokenise(source_row, self.report)
            self.next_row += 1
            if row is not None:
                rows.append(row)
                tokens += len(row.input_ids)
            if tokens >= self.chunk_tokens or time.monotonic() - begun >= self.chunk_seconds:
                self._write_chunk(rows)
                rows, tokens, begun, first = [], 0, time.monotonic(), self.next_row
        if self.next_row > first:
            self._write_chunk(rows)
        self._write_index(complete=True)

    def _write_chunk(self, rows: list[TokenRow]) -> None:
        from safetensors.numpy import save

        none_i, none_b = np.zeros(0, np.int32), np.zeros(0, bool)
        tensors = {
            "ids": np.concatenate([none_i, *(row.input_ids for row in rows)]),
            "supervised": np.concatenate([none_b, *(row.supervised for row in rows)]),
            "offsets": np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64),
            "sample_ids": np.asarray([row.sample_id for row in rows], dtype=np.int64),
        }
        metadata = {
            "next_row": str(self.next_row),
            "report": json.dumps(self.report.to_dict()),
        }
        name = _chunk_name(len(self.chunks))
        write_atomic(self.folder / name, save(tensors, metadata))
        self._take(self.folder / name, len(rows))

    def _take(self, path: Path, rows: int) -> None:
        self.chunks.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size})

    def _write_index(self, complete: bool) -> None:
        index = {
            "format": FORMAT,
            "key": self.key,
            "complete": complete,
            "chunks": self.chunks,
            "report": self.report.to_dict(),
        }
        write_atomic(self.folder / INDEX, json.dumps(index, indent=1).encode())

    def _resume(self) -> None:
        """Takes over the chunks from the first on without a gap; clears the rest."""
        _read_index(self.folder, self.key)
        while (path := self.folder / _chunk_name(len(self.chunks))).exists():
            file = _open_chunk(path)
            metadata = file.metadata()
            self.next_row = int(metadata["next_row"])
            self.report = RowReport.from_dict(json.loads(metadata["report"]))
            self._take(path, file.get_slice("sample_ids").get_shape()[0])
        taken = {chunk["file"] for chunk in self.chunks}
        for path in self.folder.iterdir():
            if path.suffix == ".tmp" or (path.suffix == ".safetensors" and path.name not in taken):
                path.unlink()
        self._write_index(complete=False)


def _read_index(folder: Path, key: Key | None) -> dict[str, Any] | None:
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete the folder {folder}") from error
    stored = {"format": index["format"], **index["key"]}
    wanted = stored if key is None else {"format": FORMAT, **key}
    differing = sorted(
        name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)
    )
    if differing:
        told = "; ".join(
            f"{name}: {stored.get(name)!r} there, {wanted.get(name)!r} asked for"
            for name in differing
        )
        raise UserError(f"{folder}: these tokens were made with other settings: {told}")
    return index


def _is_complete(folder: Path, key: Key) -> bool:
    index = _read_index(folder, key)
    return index is not None and bool(index["complete"])


def _chunk_name(number: int) -> str:
    return f"chunk-{number:05d}.safetensors"


def _open_chunk(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: missing, cut short or damaged ({error}); delete the folder {path.parent}, "
            "and the next run writes it again"
        ) from error
