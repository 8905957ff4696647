"""Token rows to a `DraftBatch`: padding, anchors and their counts.

Legend: B rows, S tokens per row, A anchors per row, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.sampler import Item
from drafter.blocks import (
    INVALID_ANCHOR,
    PADDING_DOCUMENT,
    DraftBatch,
    Span,
    VisiblePrefix,
    count_valid,
    sample_anchors,
)
from drafter.packing import pack, place

NO_PREFIX = VisiblePrefix()


class Row(Protocol):
    """What a batch needs of a row; `data.conversations.TokenRow` is one."""

    sample_id: int
    input_ids: np.ndarray
    supervised: np.ndarray


class StoredFeatures(Protocol):
    """Features of rows by place; `data.cache_format.CachedRows` is one."""

    def hidden_states(self, index: int) -> Tensor:
        """Returns (positions, L*D)."""
        ...

    def last_hidden(self, index: int) -> Tensor:
        """Returns (positions, D)."""
        ...


class BatchDataset(Dataset[DraftBatch]):
    """Maps a list of `Item`s to one right-padded `DraftBatch` with anchors.

    Args:
        rows: The row set.
        num_anchors: A, at most, per row; rows with fewer candidates get invalid blocks.
        block_size: K, for the counts of valid slots.
        seed: Of the anchors.
        pad_multiple: S is rounded up to a multiple of this: few shapes suit a compiler.
        resample: False keeps every row's anchors of epoch 0 (validation).
        pack_length: Lay rows end to end in batch rows of up to so many tokens; 0 for one in each.
            What is drawn and scored is the same.
        features: Where rows' features are read from, by place; None leaves them to others.
        last_hidden: Also read what the head reads.
        visible_prefix: How many of their first slots blocks show.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        num_anchors: int,
        block_size: int,
        seed: int = 0,
        pad_multiple: int = 1,
        resample: bool = True,
        pack_length: int = 0,
        features: StoredFeatures | None = None,
        last_hidden: bool = False,
        visible_prefix: VisiblePrefix = NO_PREFIX,
    ) -> None:
        self.rows = rows
        self.num_anchors = num_anchors
        self.block_size = block_size
        self.seed = seed
        self.pad_multiple = pad_multiple
        self.resample = resample
        self.pack_length = pack_length
        self.features = features
        self.last_hidden = last_hidden
        self.visible_prefix = visible_prefix

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.rows)

    def __getitem__(self, items: list[Item]) -> DraftBatch:
        """Returns the batch of these rows."""
        rows = [self.rows[item.row] for item in items]
        lengths = [len(row.input_ids) for row in rows]
        if self.pack_length:
            spans = pack(lengths, self.pack_length, self.num_anchors * self.block_size)
        else:
            spans = [Span(i, 0, tokens) for i, tokens in enumerate(lengths)]
        count, longest = 1 + max(span.row for span in spans), max(span.last for span in spans)
        length = -(-longest // self.pad_multiple) * self.pad_multiple
        input_ids = np.zeros((count, length), dtype=np.int64)
        supervised = np.zeros((count, length), dtype=bool)
        document_ids = np.full((count, length), PADDING_DOCUMENT, dtype=np.int64)
        positions = np.tile(np.arange(length), (count, 1))
        drawn: list[list[np.ndarray]] = [[] for _ in range(count)]
        shown: list[list[np.ndarray]] = [[] for _ in range(count)]
        laid = sorted(zip(spans, items, rows, strict=True), key=lambda one: one[0])
        for (place_row, first, last), item, row in laid:
            input_ids[place_row, first:last] = row.input_ids
            supervised[place_row, first:last] = row.supervised
            document_ids[place_row, first:last] = document_ids[place_row].max() + 1
            positions[place_row, first:last] = np.arange(last - first)
            if item.scored:
                epoch = item.epoch if self.resample else 0
                key = {"seed": self.seed, "sample_id": row.sample_id, "epoch": epoch}
                own = sample_anchors(row.supervised, self.num_anchors, **key)
                own = own[own >= 0]
                drawn[place_row].append(own + first)
                if self.visible_prefix.share:
                    supervised_S = np.asarray(row.supervised, dtype=bool)
                    shown[place_row].append(
                        self.visible_prefix.sample(supervised_S, own, self.block_size, **key)
                    )
        batch = DraftBatch(
            input_ids=torch.from_numpy(input_ids),
            supervised=torch.from_numpy(supervised),
            document_ids=torch.from_numpy(document_ids),
            positions=torch.from_numpy(positions),
            anchors=torch.from_numpy(self._by_row(drawn, INVALID_ANCHOR)),
            sample_ids=torch.tensor([row.sample_id for row in rows]),
            spans=tuple(spans),
        )
        if self.visible_prefix.share:
            batch.visible = torch.from_numpy(self._by_row(shown, 0))
        if self.features is not None:
            places = [item.row for item in items]
            shape = (spans, count, length)
            batch.hidden_states = place([*map(self.features.hidden_states, places)], *shape)
            if self.last_hidden:
                batch.last_hidden = place([*map(self.features.last_hidden, places)], *shape)
        batch.valid_counts = count_valid(batch, self.block_size)
        batch.num_slots = int(batch.valid_counts.sum())
        return batch

    def _by_row(self, drawn: list[list[np.ndarray]], padding: int) -> np.ndarray:
        """Returns (B, A) of each row's blocks, padded; A is the fullest row's number of them."""
        rows = [np.concatenate(own) if own else np.zeros(0, dtype=np.int64) for own in drawn]
        # an empty column is work for nothing, but a compiler likes few shapes
        step = 1 if self.pad_multiple == 1 else self.num_anchors
        columns = step * max(1, max(-(-len(own) // step) for own in rows))
        out = np.full((len(rows), columns), padding, dtype=np.int64)
        for i, own in enumerate(rows):
            out[i, : len(own)] = own
        return out
