"""Token rows to `DraftBatch`es: padding, anchors and their counts.

Legend: B rows, S tokens per row, A anchors per row, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
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


class BatchDataset(Dataset[DraftBatch]):
    """Maps a list of `Item`s to one right-padded `DraftBatch` with anchors.

    Args:
        rows: The row set.
        num_anchors: A, at most, per row; rows with fewer candidates get invalid blocks.
        block_size: K, for the counts of valid slots.
        seed: Of the anchors.
        pad_multiple: S is rounded up to a multiple of this: few shapes suit a compiler.
        resample: False keeps every row's anchors of epoch 0 (validation).
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
    ) -> None:
        self.rows = rows
        self.num_anchors = num_anchors
        self.block_size = block_size
        self.seed = seed
        self.pad_multiple = pad_multiple
        self.resample = resample

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
        batch.valid_counts = count_valid(batch, self.block_size)
        batch.num_slots = int(batch.valid_counts.sum())
        return batch
