"""Rows of chat or text to token rows: ids, and which tokens the target would have to write.

The one entry is `load_rows`. Reading is in `sources.py`, the shapes of rows in `formats.py`, the
chat template in `render.py` and `turns.py`, counting in `rows.py`, streams in `token_file.py`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.presets import PresetSource
from data.render import fingerprint
from data.rows import RowReport, RowSet, RowTokenizer, TokenRow
from data.sources import Source, SourceRow
from data.token_file import folder_for, load_or_build
from drafter.errors import UserError
from drafter.files import cache_root

__all__ = ["RowReport", "RowSet", "TokenRow", "check_tokenizer_fits", "load_rows"]

log = logging.getLogger(__name__)


def load_rows(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int | None,
    target_max_length: int | None = None,
    eos_token_ids: Sequence[int] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
    skip: int = 0,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    held_out: RowSet | None = None,
) -> RowSet:
    """Returns the rows of `source` that a drafter can be trained on, as tokens.

    Args:
        source: json, jsonl or parquet files, plain or .gz; a folder of them; a preset
            ("preset:NAME", see `data/presets.py`); a list of these; or a hub id ("org/name" or
            "org/name:config"), read through `datasets`.
        tokenizer: the target's.
        vocab_size: rows of the target's embedding.
        max_length: rows longer than this are cut, and counted; None cuts none.
        target_max_length: the target's context, in tokens.
        eos_token_ids: ids that end the target's generation, beside the tokenizer's own.
        template_kwargs: passed to the chat template, e.g. `{"enable_thinking": False}`.
        limit: source rows to read after `skip`, usable or not; None reads all.
        skip: source rows to pass over first. Sample ids do not depend on `skip` and `limit`.
        split: split of a hub data set.
        revision: hub revision.
        streaming: keep the tokens in files on disk, written as the rows arrive, not in memory.
        cache_dir: where those files lie; None for ~/.cache/l2r-drafter.
        progress: show a bar.
        held_out: rows whose prompts must not come; others with one are left out, and counted.

    Raises:
        UserError: the source cannot be read, a row is malformed, no row can be trained on,
            or the tokenizer does not fit the target.
    """
    if skip < 0 or (limit is not None and limit < 0):
        raise UserError(f"skip is {skip} and limit is {limit}; neither may be negative")
    check_tokenizer_fits(tokenizer, vocab_size)
    held_out_prompts = {row.prompt for row in held_out or ()} - {b""}
    tokenise = RowTokenizer(
        tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
        target_max_length=target_max_length,
        eos_token_ids=eos_token_ids,
        template_kwargs=template_kwargs,
        held_out=held_out_prompts,
    )
    reader = Source(source, split=split, streaming=streaming, revision=revision)

    def open_rows(start: int) -> Iterator[SourceRow]:
        rest = None if limit is None else max(0, limit - start)
        return _with_bar(islice(reader.rows(skip + start), rest), reader.name, rest, progress)

    if streaming:
        key = {
            **_source_key(reader),
            "skip": skip,
            "limit": limit,
            **fingerprint(tokenizer, template_kwargs),
            "eos_token_ids": sorted(tokenise.eos_token_ids),
            "vocab_size": vocab_size,
            "max_length": max_length,
            "target_max_length": target_max_length,
        }
        if held_out_prompts:
            together = b"\n".join(sorted(held_out_prompts))
            key["held_out"] = hashlib.sha256(together).hexdigest()
        folder = folder_for(cache_root(cache_dir), key)
        rows = load_or_build(folder, key, open_rows, tokenise, source=reader.name)
    else:
        report = RowReport(reader.name)
        kept = (tokenise(row, report) for row in open_rows(0))
        rows = RowSet([row for row in kept if row is not None], report)
    rows.report.check_usable()
    return rows


def check_tokenizer_fits(tokenizer: Any, vocab_size: int) -> None:
    """Checks that the ids a tokenizer gives are rows of the target's embedding.

    Added tokens may lie beyond the embedding (Gemma 3's text models share a tokenizer with an image
    token that they lack): these are logged here; a row that holds one is refused when it comes.

    Raises:
        UserError: the vocabulary itself does not fit.
    """
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    ids = {int(i) for i in tokenizer.get_vocab().values()}
    base = max(ids - added, default=-1)
    if base >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {base}, but the target's embedding has {vocab_size} "
            "rows: this tokenizer belongs to another model"
        )
    beyond = sorted(i for i in ids if i >= vocab_size)
    if beyond:
        log.warning(
            "the tokenizer's added tokens %s lie beyond the target's embedding of %d rows; rows "
            "that hold them will be refused",
            beyond[:5],
            vocab_size,
        )


def _source_key(reader: Source) -> dict[str, Any]:
    """What tells a source's content: size and time of files, revision of a hub data set."""
    entries = reader.entries()
    if any(isinstance(entry, PresetSource) for entry, _ in entries):
        keys = [
            [_stats(files), entry.key() if isinstance(entry, PresetSource) else None]
            for entry, files in entries
        ]
        on_hub = any(files is None for _, files in entries)
        return {"entries": keys, "revision": reader.revision if on_hub else None}
    files = reader.files()
    if files is None:
        return {"source": reader.name, "split": reader.split, "revision": reader.revision}
    return {"source": _stats(files)}


def _stats(files: list[Path] | None) -> list[Any] | None:
    if files is None:
        return None
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _with_bar(
    rows: Iterable[SourceRow], name: str, total: int | None, progress: bool
) -> Iterator[SourceRow]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    short = name if len(name) <= 40 else f"...{name[-37:]}"
    silent = not progress or os.environ.get("LOCAL_RANK", "0") != "0"  # one bar for all ranks
    yield from tqdm(rows, f"tokenising {short}", total=total, unit=" rows", disable=silent)
