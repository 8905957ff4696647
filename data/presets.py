"""Public data sets by name: where each lies on the hub, and what its columns mean to us.

`preset:NAME` is the data set's usual training split, `preset:NAME/SPLIT` another one, and
`preset:NAME=PATH` (or `preset:NAME/SPLIT=PATH`) reads a local copy: a file, or a folder of them,
with the data set's own columns. What `formats.py` understands already is left to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.formats import row_messages
from drafter.errors import UserError

PREFIX = "preset:"
_NOTHING = {"prompt": "", "response": ""}  # counted and left out as an empty response

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A public data set.

    Attributes:
        hub_id: "org/name".
        split: Read unless another is asked for.
        columns: That hold the row; all others are dropped. Either one list of messages, or several
            fields of a prompt/response pair.
        config: Its configuration on the hub, if it has several.
        data_files: The file to read, where a repository holds more than the data set.
        streams: Read it as it arrives whatever `data.streaming` says, since `datasets` would
            download all splits of its hundreds of gigabytes first.
        tools: Reads the tools that a row's conversation may call.
    """

    hub_id: str
    split: str
    columns: tuple[str, ...]
    config: str | None = None
    data_files: str | None = None
    streams: bool = False
    tools: Callable[[Row], Any] | None = None


def _tools_of_metadata(row: Row) -> Any:
    """Returns the tools in Nemotron v1's JSON column `metadata`, or None."""
    try:
        metadata = json.loads(row.get("metadata") or "{}")
    except ValueError:
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

    def files(self, suffix_of: Callable[[Path], str | None]) -> list[Path] | None:
        """Returns the local copy's files in sorted order, or None where there is none.

        In a folder laid out as on the hub (`data/train_sft-00000-of-00003.parquet`) these are the
        files of the split; in one where no name begins with the split's, all files.

        Args:
            suffix_of: Gives a readable file's suffix, None for another file.

        Raises:
            UserError: Nothing is there, or nothing of a split that was asked for.
        """
        if self.path is None:
            return None
        if self.path.is_file() and suffix_of(self.path):
            return [self.path]
        for folder in (self.path, self.path / "data"):
            inside = folder.iterdir() if folder.is_dir() else ()
            files = sorted(file for file in inside if file.is_file() and suffix_of(file))
            if files:
                break
        else:
            raise UserError(
                f"{self.path}: no json, jsonl or parquet file there for preset {self.name}; "
                f"download {self.preset.hub_id} into it, or leave '={self.path}' out of the preset "
                "to read the hub"
            )
        split = re.compile(re.escape(self.split or self.preset.split) + r"[-.]")
        of_split = [file for file in files if split.match(file.name)]
        if self.split and not of_split:
            raise UserError(
                f"{self.path}: no file name begins with {self.split!r}; leave '/{self.split}' out "
                f"of preset:{self.name} to read all files there"
            )
        return of_split or files

    def hub_arguments(self, streaming: bool) -> tuple[str, str, str, dict[str, Any]]:
        """Returns hub id, configuration or "", split and keyword arguments for `datasets`."""
        preset = self.preset
        options: dict[str, Any] = {"streaming": streaming or preset.streams}
        if preset.data_files:
            options["data_files"] = preset.data_files
        return preset.hub_id, preset.config or "", self.split or preset.split, options

    def key(self) -> list[str | None]:
        """Returns what of the preset decides which rows are read, and how."""
        preset = self.preset
        split = self.split or preset.split
        return [preset.hub_id, preset.config, preset.data_files, split, *preset.columns]

    def row(self, data: Row, where: str) -> Row:
        """Returns one of the data set's rows in a shape that `formats.parse` understands.

        Raises:
            UserError: A column is missing, or a message is malformed; names the row.
        """
        preset = self.preset
        missing = [column for column in preset.columns if column not in data]
        if missing:
            raise UserError(
                f"{where}: no column {', '.join(missing)}, which preset {self.name} reads (there "
                f"are: {', '.join(data) or 'none'}); is this a copy of {preset.hub_id}?"
            )
        if len(preset.columns) > 1:
            return {column: data[column] for column in preset.columns}
        if not data[preset.columns[0]]:
            return dict(_NOTHING)
        messages = row_messages({preset.columns[0]: data[preset.columns[0]]}, where)
        kept = list(_tidy(messages or []))
        if not kept:
            return dict(_NOTHING)
        tools = preset.tools(data) if preset.tools else None
        return {"messages": kept} if tools is None else {"messages": kept, "tools": tools}


def parse_preset(source: str) -> PresetSource | None:
    """Returns the preset that a source names, or None if it names none.

    Raises:
        UserError: There is no preset of that name.

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
            f"{source}: no preset is called {name!r}; choose one of {', '.join(sorted(PRESETS))}"
        )
    if has_path and not path:
        raise UserError(f"{source}: no path after '='; leave '=' out to read the hub")
    return PresetSource(name, split or None, Path(path).expanduser() if path else None)


def _tidy(messages: list[Row]) -> Iterator[Row]:
    """Yields messages as a chat template expects them.

    Left out are system turns without text (all of Nemotron's splits have them; a template would
    write an empty system block), answers before the first question (conversations of ShareGPT that
    were cut in two begin with them), and empty lists of tool calls (Llama 3.2's template refuses
    them).
    """
    asked = False
    for message in messages:
        role = message["role"]
        if role == "system" and not message.get("content"):
            continue
        asked = asked or role == "user"
        if role != "system" and not asked:
            continue
        yield {k: v for k, v in message.items() if k != "tool_calls" or v}
