"""Rows of local files, of a hub data set or of presets, each with the place it came from.

json and jsonl are read here rather than through `datasets`: a bad line is named by file and number,
and already tokenised files need no further package.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.files import SUFFIXES, file_suffix, readable_files
from data.presets import PresetSource, parse_preset
from drafter.errors import UserError

_TORN = (EOFError, gzip.BadGzipFile, zlib.error)

Entry = tuple[str | PresetSource, list[Path] | None]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read.

    Attributes:
        index: its place in the whole source, over all files, from 0.
        where: names it to a person: "chats.jsonl, line 12".
        data: column -> value.
        asks: False for a preset's row without a question, which says nothing.
    """

    index: int
    where: str
    data: dict[str, Any]
    asks: bool = True


@dataclass(frozen=True)
class Source:
    """Where rows come from: local files, a data set of the hub, or presets.

    Args:
        source: a file, folder or preset ("preset:NAME", see `data/presets.py`), a list of them, or
            a hub id ("org/name", or "org/name:config").
        split: split of a hub data set; local files and presets take none.
        streaming: read a hub data set as it arrives rather than downloading it first.
        revision: hub revision.
        cache_dir: where `datasets` keeps downloads; None for its default.
    """

    source: str | Sequence[str]
    split: str = "train"
    streaming: bool = False
    revision: str | None = None
    cache_dir: str | None = None

    @property
    def name(self) -> str:
        """The source as the user wrote it."""
        return self.source if isinstance(self.source, str) else ", ".join(map(str, self.source))

    def entries(self) -> list[Entry]:
        """Returns each entry's name or preset, with its local files; None for one on the hub.

        Raises:
            UserError: a file is missing, is of an unknown kind, or there is none; there is no such
                preset; or a hub id is not the only entry.
        """
        names = _listed(self.source)
        if not names:
            raise UserError("no data: the list of files is empty")
        return [_entry(name, alone=len(names) == 1) for name in names]

    def files(self) -> list[Path] | None:
        """Returns the local files, folders expanded in sorted order; None if any is on the hub.

        Raises:
            UserError: as `entries`.
        """
        found: list[Path] = []
        for _, files in self.entries():
            if files is None:
                return None
            found += files
        return found

    def rows(self, start: int = 0) -> Iterator[SourceRow]:
        """Yields the rows from index `start` on.

        Raises:
            UserError: a file that cannot be read or a malformed line, with its number.
        """
        entries = self.entries()
        # of a single data set on the hub, `datasets` itself passes over what is before `start`
        passed = start if len(entries) == 1 and entries[0][1] is None else 0
        every = chain.from_iterable(self.entry_rows(*entry, passed) for entry in entries)
        for index, (where, data) in enumerate(every, passed):
            if index >= start:
                yield SourceRow(index, where, data or {}, asks=data is not None)

    def entry_rows(
        self, entry: str | PresetSource, files: list[Path] | None, start: int = 0
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yields (where, row) of one entry, None for a row without a question.

        `start` counts on the hub only.
        """
        if files is None:
            rows = self._hub_rows(entry, start)
        else:
            rows = (row for path in files for row in read_file(path))
        if isinstance(entry, str):
            yield from rows
            return
        for where, data in rows:
            yield where, entry.row(data, where)

    def _hub_rows(
        self, entry: str | PresetSource, start: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        import datasets

        if isinstance(entry, str):
            name, split = entry, self.split
            path, _, config = name.partition(":")
            options: dict[str, Any] = {"streaming": self.streaming}
        else:
            config = ""
            path, split, options = entry.hub_arguments(self.streaming)
            name = f"preset:{entry.name} ({path})"
        try:
            rows = datasets.load_dataset(
                path,
                config or None,
                split=split,
                revision=self.revision,
                cache_dir=self.cache_dir,
                **options,
            )
        except Exception as error:  # datasets raises a dozen kinds for what a user can mend
            what = "no such file, and `datasets` cannot load it as a hub id"
            if not isinstance(entry, str):
                what = f"`datasets` cannot load it; =PATH after preset:{entry.name} reads a copy"
            raise UserError(
                f"{name}: {what} (split {split!r}): {type(error).__name__}: {error}"
            ) from error
        for index, data in enumerate(rows.skip(start) if start else rows, start):
            yield f"{name}[{split}], row {index}", dict(data)


def check_names(sources: Iterable[str | Sequence[str] | None], split: str) -> None:
    """Checks what can be said of sources before their rows are read: the names of presets.

    Args:
        sources: of one run; None for one that is not set.
        split: of hub data sets.

    Raises:
        UserError: there is no such preset; or a split is given, and nothing but presets, which name
            their own, to take it from.
    """
    names = [name for source in sources for name in _listed(source or ())]
    presets = [preset for preset in map(parse_preset, names) if preset]
    if presets and len(presets) == len(names) and split != "train":
        raise UserError(
            f"{', '.join(names)}: a preset names its own split; write it as "
            f"preset:{presets[0].name}/{split}, and leave train_split out"
        )


def _listed(source: str | Sequence[str]) -> list[str]:
    return list(map(str, [source] if isinstance(source, (str, Path)) else source))


def _entry(name: str, *, alone: bool) -> Entry:
    preset = parse_preset(name)
    if preset is not None:
        return preset, preset.files()
    if not _is_hub_id(name):
        return name, _local_files(Path(name).expanduser())
    if not alone:
        raise UserError(f"{name}: no such file or folder; a hub id must stand alone")
    return name, None


def _local_files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = readable_files(path)
        if not inside:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file (or .gz) in it")
        return inside
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not file_suffix(path):
        raise UserError(f"{path}: not one of {', '.join(SUFFIXES)}, plain or .gz")
    return [path]


def _is_hub_id(name: str) -> bool:
    """A name that is no path here and does not look like one that is missing."""
    path = Path(name).expanduser()
    if path.exists() or file_suffix(path) or name.startswith((".", "/", "~")):
        return False
    return name.count("/") <= 1 and not name.endswith("/")


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) of one json, jsonl or parquet file, plain or gzipped.

    Raises:
        UserError: the file is missing, torn or malformed; names file and line.
    """
    for where, row in read_file_leniently(path):
        if isinstance(row, UserError):
            raise row
        yield where, row


def read_file_leniently(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """As `read_file`, but yields a malformed line's error in its place, and reads on.

    Raises:
        UserError: the file itself is missing or torn, or is one malformed JSON list.
    """
    try:
        if file_suffix(path) == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from _json_rows(path)
    except _TORN as error:
        raise UserError(f"{path}: the gzip file is cut short or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    return path.open("rb")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    with _open(path) as file:
        # a .json file is one list, or (often) one object a line under the wrong name
        if file_suffix(path) == ".json":
            head = file.peek(256)[:256] if isinstance(file, io.BufferedReader) else file.read(256)
            file.seek(0)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _list_rows(path, file.read())
                return
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                where = f"{path}, line {number}"
                try:
                    row: dict[str, Any] | UserError = _as_row(_parse(line, where), where)
                except UserError as error:
                    row = error
                yield where, row


def _list_rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    for index, value in enumerate(rows):
        where = f"{path}, element {index}"
        try:
            row: dict[str, Any] | UserError = _as_row(value, where)
        except UserError as error:
            row = error
        yield where, row


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one "
            "whole object"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error})") from error


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object with named fields, not {value!r:.60}")
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        packed = path.name.lower().endswith(".gz")
        file = pyarrow.parquet.ParquetFile(io.BytesIO(_open(path).read()) if packed else path)
        # few rows at a time: a row may be a long conversation
        batches = file.iter_batches(batch_size=256)
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"{path}, row {index}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error
