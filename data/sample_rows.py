"""A few rows of a run's data, for a look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.cache_format import TRAIN, CachedRows, read_manifest
from data.conversations import load_rows
from data.render import ChatFormat
from data.rows import TokenRow
from drafter.errors import UserError
from drafter.target import Target


@dataclass
class Sample:
    """Rows that training can use.

    Attributes:
        rows: In the source's order.
        header_ids: Tokens that the target's template opens an assistant's turn with; () if it has
            no template.
        stored: A row's place to its features in the cache (S', L*D); None without a cache.
    """

    rows: Sequence[TokenRow]
    header_ids: Sequence[int]
    stored: Callable[[int], Tensor] | None = None


def sample_rows(
    target: Target,
    source: str | Sequence[str] | None,
    cache: Path | None,
    *,
    count: int,
    max_length: int,
) -> Sample:
    """Returns the first rows of a cache, or else of a source.

    Args:
        target: Whose tokenizer and template read them.
        source: As `data.train_data`.
        cache: Folder of a finished feature cache.
        count: Rows, at least 1.
        max_length: Longer rows are cut to it (those of a cache are as they were cut there).

    Raises:
        UserError: Neither is named, or what is named can't be used.
    """
    header = _header_ids(target)
    if cache is not None:
        kept = CachedRows(cache, read_manifest(cache).part(TRAIN))
        return Sample(kept[: min(count, len(kept))], header, kept.hidden_states)
    if not source:
        raise UserError(
            "No rows to look at: pass --data with some that the drafter was trained on."
        )
    found = load_rows(
        source,
        target.tokenizer,
        vocab_size=target.vocab_size,
        max_length=min(max_length, target.max_length),
        target_max_length=target.max_length,
        eos_token_ids=target.eos_token_ids,
        limit=8 * count,
        progress=False,
    )
    return Sample(found[:count], header)


def _header_ids(target: Target) -> list[int]:
    if getattr(target.tokenizer, "chat_template", None) is None:
        return []
    template = ChatFormat(target.tokenizer, eos_token_ids=target.eos_token_ids)
    return template.encode(template.habits.header)[0]
