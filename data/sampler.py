"""Order of the training rows as a pure function of (seed, epoch), and a loader that can resume.

Lightning-traps 2: a run that stops after any batch goes on with the next one, whatever the number
of ranks and workers: nothing about the order is remembered but (epoch, batches handed out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from drafter.blocks import DraftBatch
from drafter.errors import UserError


class Item(NamedTuple):
    """One row of a batch."""

    row: int
    """Index into the row set."""
    epoch: int
    """Decides the row's anchors."""
    scored: bool
    """False for a filler: a rank that has no row left still takes part in the step."""


class EpochBatches(Sampler[list[Item]]):
    """Batches of one rank: its share of each global batch, which is dealt out by length.

    A step lasts as long as on the rank with the longest row, so the ranks' longest rows should be
    alike: the longest are dealt first, one to each rank, by turns to another rank first.
    The last global batch may be smaller; it is spread over the ranks, and a rank that gets none of
    it gets a filler row without anchors. So a global batch holds the same rows for any world size.

    Args:
        num_rows: Rows in the set.
        batch_size: Rows per rank and batch.
        seed: Of the shuffle.
        shuffle: False keeps the order of the set (validation).
        rank: This process.
        world_size: Processes.
        block: Rows that stay near each other, for reading from disk: blocks of so many are
            shuffled, then rows within each `BLOCKS_MIXED` blocks; 0 shuffles all rows.
        tokens: Gives a row's length; None deals rows in the order that they come.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        block: int = 0,
        tokens: Callable[[int], int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.block = block
        self.tokens = tokens
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration (called by Lightning)."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns batches per epoch, the same on every rank."""
        return math.ceil(self.num_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Item]]:
        """Yields batches `start`, `start` + 1, ... of the current epoch."""
        epoch, order = self.epoch, np.arange(self.num_rows)
        if self.shuffle:
            key = np.random.SeedSequence((self.seed, epoch))
            order = shuffled(self.num_rows, self.block, np.random.Generator(np.random.Philox(key)))
        step = self.batch_size * self.world_size
        for batch in range(self.start, len(self)):
            rows = order[batch * step : (batch + 1) * step]
            own = self._share(rows, epoch + batch)
            filler = [Item(int(rows[0]), epoch, scored=False)]
            yield [Item(int(row), epoch, scored=True) for row in own] or filler

    def _share(self, rows: np.ndarray, turn: int) -> np.ndarray:
        """Returns this rank's rows of a global batch; `turn` decides who is dealt to first."""
        if self.tokens is None or self.world_size == 1:
            return rows[self.rank :: self.world_size]
        lengths = np.array([self.tokens(int(row)) for row in rows])
        by_length = rows[np.argsort(-lengths, kind="stable")]
        return by_length[(self.rank - turn) % self.world_size :: self.world_size]


BLOCKS_MIXED = 8
"""Blocks whose rows are mixed with each other."""


def shuffled(num_rows: int, block: int, random: np.random.Generator) -> np.ndarray:
    """Returns (num_rows,) a permutation; with `block`, rows keep to their neighbourhood.

    Args:
        num_rows: Rows.
        block: See `EpochBatches`.
        random: Decides it.
    """
    if not block:
        return random.permutation(num_rows)
    blocks = [np.arange(at, min(at + block, num_rows)) for at in range(0, num_rows, block)]
    order = random.permutation(len(blocks))
    mixed = [
        random.permutation(np.concatenate([blocks[i] for i in order[at : at + BLOCKS_MIXED]]))
        for at in range(0, len(order), BLOCKS_MIXED)
    ]
    return np.concatenate(mixed) if mixed else np.arange(0)


class DraftLoader(DataLoader[DraftBatch]):
    """Loader of `DraftBatch`es with `state_dict`/`load_state_dict` for exact mid-epoch resume.

    The state counts batches handed to the trainer, not those prefetched by workers. Every batch
    also carries the valid-slot counts of its whole accumulation window (method.md, Reductions).

    Args:
        dataset: Maps a list of `Item`s to a `DraftBatch`.
        batches: The order.
        accumulate: Micro-batches per optimizer step.
        limit: Batches of an epoch that the trainer will take; the last window ends there.
        before_epoch: Called on every rank before an epoch's, or the rest of one's, first batch.
        num_workers: Worker processes.
        pin_memory: Page-lock batches for transfer to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset[DraftBatch],
        batches: EpochBatches,
        *,
        accumulate: int = 1,
        limit: int | None = None,
        before_epoch: Callable[[], None] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=None,  # the dataset makes whole batches
            sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=False,
            # worker seeds come from this generator: the training RNG must not move
            generator=torch.Generator().manual_seed(batches.seed),
        )
        self.batches = batches
        self.accumulate = accumulate
        self.limit = limit
        self.before_epoch = before_epoch
        self._epoch = 0
        self._handed = 0

    def __len__(self) -> int:
        """Returns batches per epoch."""
        return len(self.batches) if self.limit is None else min(self.limit, len(self.batches))

    def __iter__(self) -> Iterator[DraftBatch]:  # type: ignore[override]
        """Yields the rest of the current epoch after `load_state_dict`, else the whole epoch.

        A generator: the epoch is read at the first `next`, after Lightning has set it.
        """
        if self.before_epoch is not None:
            self.before_epoch()
        if self._epoch != self.batches.epoch or self._handed >= len(self):
            self._epoch, self._handed = self.batches.epoch, 0
        first = self._handed
        # start at the window's first batch, so that its counts are those of an unbroken run
        self.batches.start = first - first % self.accumulate
        skip = first - self.batches.start
        rest = len(self) - self.batches.start
        for window in _windows(islice(super().__iter__(), rest), self.accumulate):
            counts = sum(batch.valid_counts for batch in window if batch.valid_counts is not None)
            for batch in window[skip:]:
                if batch.valid_counts is not None:
                    batch.window_counts = torch.as_tensor(counts)
                self._handed += 1
                yield batch
            skip = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns where the run stands and what that depends on; plain values only."""
        return {"epoch": self._epoch, "handed": self._handed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch handed out.

        Raises:
            UserError: The order would not be that of the interrupted run.
        """
        for key, now in self._identity().items():
            if state.get(key, now) != now:
                raise UserError(
                    f"The checkpoint was written with {key}={state[key]}, this run has {now}: the "
                    f"rows would come in another order. Resume with {key}={state[key]}, or start "
                    "a new run."
                )
        self._epoch, self._handed = int(state["epoch"]), int(state["handed"])
        self.batches.set_epoch(self._epoch)

    def _identity(self) -> dict[str, int]:
        return {
            "num_rows": self.batches.num_rows,
            "batch_size": self.batches.batch_size,
            "world_size": self.batches.world_size,
            "accumulate_grad_batches": self.accumulate,
            "seed": self.batches.seed,
            "shuffle_block": self.batches.block,
        }


def _windows(batches: Iterator[DraftBatch], size: int) -> Iterator[list[DraftBatch]]:
    """Yields lists of `size` consecutive batches; the last may be shorter."""
    window: list[DraftBatch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def rank_and_world(trainer: Any) -> tuple[int, int]:
    """Returns (rank, world size) of a Trainer, (0, 1) without one."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
