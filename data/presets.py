"""Public data sets by name: where each lies on the hub, and what its columns mean to us.

`preset:NAME` is the data set's usual training split, `preset:NAME/SPLIT` another one, and
`preset:NAME=PATH` (or `preset:NAME/SPLIT=PATH`) reads a local copy: a file, or a folder of them,
with the data set's own columns. What `formats.py` understands already is left to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import file_suffix, readable_files
from data.formats import row_messages
from drafter.errors import UserError

PREFIX = "preset:"
READING = 1
"""Part of the key of stored tokens: raise it whenever `PresetSource.row` reads rows otherwise."""
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.")

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A public data set.

    Attributes:
        hub_id: "org/name".
        split: Read unless another is asked for.
        columns: That hold the row; all others are dropped. Either one list of messages, or several
            fields of a prompt/response pair.
        data_files: The file to read, where a repository holds more than the data set.
        streams: Read it as it arrives whatever `data.streaming` says, since `datasets` would
            download all splits of its hundreds of gigabytes first.
        prefixes: Split -> how its files' names begin, where not with the split's.
        tools: Reads the tools that a row's conversation may call.
    """

    hub_id: str
    split: str
    columns: tuple[str, ...]
    data_files: str | None = None
    streams: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict)
    tools: Callable[[Row], Any] | None = None


def _tools_of_metadata(row: Row) -> Any:
    """Returns the tools in Nemotron v1's JSON column `metadata`, or None."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        try:
            metadata = json.loads(metadata or "{}")
        except (TypeError, ValueError):
            return None
    return (metadata.get("tools") or None) if isinstance(metadata, dict) else None


# Sources: the data sets' cards on the hub (columns, splits, sizes).
PRESETS = {
    "sharegpt": Preset(
        "Aeala/ShareGPT_Vicuna_unfiltered",
        "train",
        ("conversations",),
        data_files="ShareGPT_V4.3_unfiltered_cleaned_split.json",
    ),
    "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", "train_sft", ("messages",)),
    "nemotron-v1": Preset(
        "nvidia/Nemotron-Post-Training-Dataset-v1",
        "chat",  # or code, math, stem, tool_calling
        ("messages",),
        streams=True,
        prefixes={"tool_calling": "tool"},
        tools=_tools_of_metadata,
    ),
    # Gated: accept its terms on the hub first. Splits: chat, code, math, stem, multilingual_*.
    "nemotron-v2": Preset(
        "nvidia/Nemotron-Post-Training-Dataset-v2", "chat", ("messages",), streams=True
    ),
    "codealpaca": Preset("sahil2801/CodeAlpaca-20k", "train", ("instruction", "input", "output")),
    "perfectblend": Preset("mlabonne/open-perfectblend", "train", ("conversations",)),
}


@dataclass(frozen=True)
class PresetSource:
    """A preset as the user asked for it.

    Attributes:
        name: In `PRESETS`.
        split: Asked for; None for the preset's own.
        path: A local copy; None reads the hub.
    """

    name: str
    split: str | None = None
    path: Path | None = None

    @property
    def preset(self) -> Preset:
        """What the name stands for."""
        return PRESETS[self.name]

    def files(self) -> list[Path] | None:
        """Returns the local copy's files in sorted order, or None where there is none.

        In a folder laid out as on the hub (`data/train_sft-00000-of-00003.parquet`) these are the
        files of the split; in one where no name tells of a split, all files.

        Raises:
            UserError: Nothing is there, or files of other splits only.
        """
        path, preset = self.path, self.preset
        if path is None:
            return None
        if path.is_file() and file_suffix(path):
            return [path]
        split = self.split or preset.split
        if preset.data_files and split == preset.split and (path / preset.data_files).is_file():
            return [path / preset.data_files]
        beside, inside = readable_files(path), readable_files(path / "data")
        if not beside + inside:
            raise UserError(
                f"{path}: no json, jsonl or parquet file there for preset {self.name}; "
                f"download {preset.hub_id} into it, or leave '={path}' out of the preset "
                "to read the hub"
            )
        begins = preset.prefixes.get(split, split)
        named = re.compile(re.escape(begins) + r"[-.]")
        for files in (beside, inside):
            of_split = [file for file in files if named.match(file.name)]
            if of_split:
                return of_split
        shards = [_SHARD.match(file.name) for file in beside + inside]
        splits = {prefix: name for name, prefix in preset.prefixes.items()}
        found = sorted({splits.get(shard[1], shard[1]) for shard in shards if shard})
        if self.split or found:
            there = f" (splits there: {', '.join(found)})" if found else ""
            raise UserError(
                f"{path}: no file name begins with {begins!r}{there}; preset:{self.name}=FILE "
                "reads one file, whatever its name"
            )
        return beside or inside

    def hub_arguments(self, streaming: bool) -> tuple[str, str, dict[str, Any]]:
        """Returns hub id, split and keyword arguments for `datasets`."""
        preset = self.preset
        options: dict[str, Any] = {"streaming": streaming or preset.streams}
        if preset.data_files:
            options["data_files"] = preset.data_files
        return preset.hub_id, self.split or preset.split, options

    def key(self) -> list[Any]:
        """Returns what of the preset decides which rows are read, and how."""
        preset = self.preset
        split = self.split or preset.split
        return [READING, preset.hub_id, preset.data_files, split, *preset.columns]

    def row(self, data: Row, where: str) -> Row | None:
        """Returns one of the data set's rows in a shape that `formats.parse` understands.

        Of a row with a malformed message that is the row as it is, for `parse` to refuse; None is a
        row without a question.

        Raises:
            UserError: A column is missing; names the row.
        """
        preset = self.preset
        missing = [column for column in preset.columns if column not in data]
        if missing:
            raise UserError(
                f"{where}: no column {', '.join(missing)}, which preset {self.name} reads (there "
                f"are: {', '.join(data) or 'none'}); is this a copy of {preset.hub_id}?"
            )
        if not data[preset.columns[0]]:
            return None
        if len(preset.columns) > 1:
            return {column: data[column] for column in preset.columns}
        said = {preset.columns[0]: data[preset.columns[0]]}
        try:
            kept = list(_tidy(row_messages(said, where) or []))
        except UserError:
            return said
        if all(message["role"] == "system" for message in kept):
            return None
        tools = preset.tools(data) if preset.tools else None
        return {"messages": kept} if tools is None else {"messages": kept, "tools": tools}


def parse_preset(source: str) -> PresetSource | None:
    """Returns the preset that a source names, or None if it names none.

    Raises:
        UserError: There is no preset of that name, or the split or path can be none.

    Example:
        >>> parse_preset("preset:ultrachat/test_sft=/data/ultrachat")
        PresetSource(name='ultrachat', split='test_sft', path=PosixPath('/data/ultrachat'))
        >>> parse_preset("rows.jsonl") is None
        True
    """
    if not source.startswith(PREFIX):
        return None
    called, has_path, path = source.removeprefix(PREFIX).partition("=")
    name, _, split = called.partition("/")
    if name not in PRESETS:
        raise UserError(
            f"{source}: no preset is called {name!r}; choose one of {', '.join(sorted(PRESETS))} "
            f"(a local file so called is read as ./{source})"
        )
    if "/" in split:
        raise UserError(
            f"{source}: {split!r} is no split; a local copy is preset:{name}={split}, with '='"
        )
    if has_path and not path:
        raise UserError(f"{source}: no path after '='; leave '=' out to read the hub")
    return PresetSource(name, split or None, Path(path).expanduser() if path else None)


def _tidy(messages: list[Row]) -> Iterator[Row]:
    """Yields messages as a chat template expects them.

    Left out are blank system turns (all of Nemotron's splits have them; a template would
    write an empty system block), answers before the first question (conversations of ShareGPT that
    were cut in two begin with them), and empty lists of tool calls (Llama 3.2's template refuses
    them).
    """
    asked = False
    for message in messages:
        role = message["role"]
        content = message.get("content")
        if role == "system" and not (content.strip() if isinstance(content, str) else content):
            continue
        asked = asked or role == "user"
        if role != "system" and not asked:
            continue
        yield {k: v for k, v in message.items() if k != "tool_calls" or v}
