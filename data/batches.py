"""Token rows to `DraftBatch`es: padding, anchors and their counts.

Legend: B rows, S tokens per row, A anchors per row, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    count_valid,
    sample_anchors,
)


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
        features: Where rows' features are read from, by place; None leaves them to others.
        last_hidden: Also read what the head reads.
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
        features: StoredFeatures | None = None,
        last_hidden: bool = False,
    ) -> None:
        self.rows = rows
        self.num_anchors = num_anchors
        self.block_size = block_size
        self.seed = seed
        self.pad_multiple = pad_multiple
        self.resample = resample
        self.features = features
        self.last_hidden = last_hidden

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.rows)

    def __getitem__(self, items: list[Item]) -> DraftBatch:
        """Returns the batch of these rows."""
        rows = [self.rows[item.row] for item in items]
        longest = max(len(row.input_ids) for row in rows)
        length = -(-longest // self.pad_multiple) * self.pad_multiple
        input_ids = np.zeros((len(rows), length), dtype=np.int64)
        supervised = np.zeros((len(rows), length), dtype=bool)
        document_ids = np.full((len(rows), length), PADDING_DOCUMENT, dtype=np.int64)
        anchors = np.full((len(rows), self.num_anchors), INVALID_ANCHOR, dtype=np.int64)
        for i, (item, row) in enumerate(zip(items, rows, strict=True)):
            tokens = len(row.input_ids)
            input_ids[i, :tokens] = row.input_ids
            supervised[i, :tokens] = row.supervised
            document_ids[i, :tokens] = 0
            if item.scored:
                anchors[i] = sample_anchors(
                    row.supervised,
                    self.num_anchors,
                    seed=self.seed,
                    sample_id=row.sample_id,
                    epoch=item.epoch if self.resample else 0,
                )
        # no more columns than the fullest row needs: an empty column is work for nothing
        used = max(1, int((anchors >= 0).sum(1).max())) if self.pad_multiple == 1 else None
        batch = DraftBatch(
            input_ids=torch.from_numpy(input_ids),
            supervised=torch.from_numpy(supervised),
            document_ids=torch.from_numpy(document_ids),
            positions=torch.arange(length).repeat(len(rows), 1),
            anchors=torch.from_numpy(anchors[:, :used].copy()),
            sample_ids=torch.tensor([row.sample_id for row in rows]),
        )
        if self.features is not None:
            places = [item.row for item in items]
            batch.hidden_states = _padded(map(self.features.hidden_states, places), length)
            if self.last_hidden:
                batch.last_hidden = _padded(map(self.features.last_hidden, places), length)
        batch.valid_counts = count_valid(batch, self.block_size)
        batch.num_slots = int(batch.valid_counts.sum())
        return batch


def _padded(rows: Iterable[Tensor], length: int) -> Tensor:
    """Returns (B, length, F) of rows (S_i, F), zero where nothing is kept: no block looks there."""
    rows = list(rows)
    out = rows[0].new_zeros((len(rows), length, rows[0].shape[-1]))
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
