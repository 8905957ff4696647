"""Fills a feature cache while a run trains on its rows: the target runs once, and not beforehand.

The shards are those that `python -m data.cache build` would make, at their full size from the first
row on; every row is written at its place when a step has computed its features. A journal of each
rank says which rows are on the disk. When all are, the shards get their names and the manifest is
written: from then on it is a cache like any other.

Legend: T positions of a row, L tapped layers, D hidden size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.cache_build import FILLING, Builder, CacheSettings, PlannedShard
from data.cache_format import (
    HELD_OUT,
    TRAIN,
    Manifest,
    kept_positions,
    last_positions,
    read_manifest,
    write_shard,
)
from data.rows import TokenRow
from data.sampler import rank_and_world
from drafter.errors import UserError
from drafter.files import lock
from drafter.ranks import sum_over_ranks

HELD = "filling.lock"
JOURNAL = "filled-*.log"
RECORD = 3
"""int64 values of a record: a row's place, tokens scored, and how many are the target's argmax."""


class CacheFilling:
    """A cache whose training rows are still coming.

    Args:
        builder: Of the cache; it has the target and the rows.
        rank: This process.
        world_size: Processes; all write into the same folder.
        agree: Sums a number over all processes, and thereby waits for them.

    Raises:
        UserError: The folder holds another cache, another run fills it, or there is no room.
    """

    def __init__(
        self,
        builder: Builder,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[float], float] = float,
    ) -> None:
        self.builder = builder
        self.folder = builder.folder
        self._rank, self._world_size, self._agree = rank, world_size, agree
        self._hold()
        self._plan = builder.prepare()
        builder.build([shard for shard in self._plan if shard.part != TRAIN])
        self._shards = [shard for shard in self._plan if shard.part == TRAIN]
        self._rows = builder.parts[TRAIN]
        self._places = {row.sample_id: place for place, row in enumerate(self._rows)}
        self._done = set(read_journals(self.folder)[:, 0].tolist())
        for shard in self._shards:
            rows = range(shard.first, shard.last)
            files = (shard.file, shard.filling)
            if builder.done(shard):
                self._done.update(rows)
            elif not self._done.isdisjoint(rows) and not any(
                (self.folder / name).exists() for name in files
            ):
                raise UserError(
                    f"{self.folder} was being filled, and its {shard.file} is gone; delete the "
                    "folder, and the next run fills it anew."
                )
        self._open: dict[int, _Filling] = {}
        self._new: list[tuple[int, int, int]] = []
        self._seconds = 0.0

    def _hold(self) -> None:
        """Keeps other runs out of the folder until this one is done with it, or dies."""
        self._held = ExitStack()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = self._rank != 0 or self._held.enter_context(lock(self.folder / HELD))
        if self._agree(float(not free)):
            raise UserError(
                f"another run is filling the cache {self.folder}; wait for it, or give this run a "
                "folder of its own (--data.cache)."
            )

    @property
    def missing(self) -> int:
        """Training rows that this process doesn't know to be there."""
        return len(self._rows) - len(self._done)

    def add(
        self, sample_ids: Sequence[int], hidden_states: Sequence[Tensor], last: Sequence[Tensor]
    ) -> None:
        """Writes rows at their places, unless they are there.

        Args:
            sample_ids: As the rows are called.
            hidden_states: (T, L*D) of each, on any device.
            last: (T, D) of each, what the head reads.
        """
        begun = time.perf_counter()
        places = [self._places[sample] for sample in sample_ids]
        new = [i for i, place in enumerate(places) if place not in self._done]
        if new:
            rows = [self._rows[places[i]] for i in new]
            hits = self.builder.argmax_hits(
                rows, pad_sequence([last[i] for i in new], batch_first=True)
            )
            for i, (equal, scored) in zip(new, hits, strict=True):
                self._shard_of(places[i]).write(places[i], hidden_states[i], last[i])
                self._done.add(places[i])
                self._new.append((places[i], scored, equal))
        self._seconds += time.perf_counter() - begun

    def flush(self) -> None:
        """Makes what was added outlast this process: features first, then the journal."""
        if not self._new:
            return
        for shard in self._open.values():
            os.fsync(shard.file)
        path = self.folder / JOURNAL.replace("*", f"{self._rank:05d}")
        with path.open("ab") as file:
            file.truncate(file.tell() - file.tell() % (8 * RECORD))  # a record that a kill cut
            file.write(np.array(self._new, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._new = []

    def finish(self) -> Manifest | None:
        """Makes a cache of it if every row is there; else returns None. All ranks call it together.

        Stopped in the middle, it is finished by the next call.
        """
        self.flush()
        self._agree(0.0)  # every journal is written
        records = {place: rest for place, *rest in read_journals(self.folder).tolist()}
        self._done.update(records)
        if self._agree(float(self.missing)):
            rank_zero_info(
                f"[cache] {self.missing:,} of {len(self._rows):,} rows are still missing in "
                f"{self.folder}; they are added when they are drawn"
            )
            return None
        self._close_files()
        for shard in self._shards[self._rank :: self._world_size]:
            self._name(shard, records)
        self._agree(0.0)
        if self._rank == 0:
            self.builder.finish(self._plan, self._seconds)
            for path in (*self.folder.glob(JOURNAL), *self.folder.glob(f"*{FILLING}")):
                path.unlink()
        self._agree(0.0)
        self.close()
        rank_zero_info(f"[cache] {self.folder} is complete; features are read from it from now on")
        return read_manifest(self.folder)

    def close(self) -> None:
        """Lets other runs at the folder."""
        self._close_files()
        self._held.close()

    def _close_files(self) -> None:
        for opened in self._open.values():
            os.close(opened.file)
        self._open = {}

    def _name(self, shard: PlannedShard, records: dict[int, list[int]]) -> None:
        aside = self.folder / shard.filling
        if self.builder.done(shard):
            return
        if aside.exists():
            os.replace(aside, self.folder / shard.file)
        rows = [self._rows[place] for place in range(shard.first, shard.last)]
        counts = [records[place] for place in range(shard.first, shard.last)]
        self.builder.describe_shard(
            shard,
            rows,
            sum(map(kept_positions, rows)),
            sum(scored for scored, _ in counts),
            sum(hits for _, hits in counts),
        )

    def _shard_of(self, place: int) -> _Filling:
        number = next(i for i, shard in enumerate(self._shards) if place < shard.last)
        if number not in self._open:
            shard = self._shards[number]
            rows = [self._rows[i] for i in range(shard.first, shard.last)]
            self._open[number] = _Filling(self.builder, shard, rows)
        return self._open[number]


def begin_filling(datamodule: Any) -> CacheFilling:
    """Returns the cache that a run fills, as it was left if a run before has begun it.

    Args:
        datamodule: An `OnlineHiddenStates`, set up and with its trainer.
    """
    trainer = datamodule.trainer
    layer_ids, last_hidden = trainer.lightning_module.feature_request()
    names = {field.name for field in dataclasses.fields(CacheSettings)}
    given = {name: getattr(datamodule, name) for name in names if hasattr(datamodule, name)}
    for callback in trainer.callbacks:  # which held-out responses verification will ask for
        given |= getattr(callback, "cache_settings", dict)()
    given |= {
        "target": datamodule.target_path,
        "target_layer_ids": list(layer_ids),
        "dtype": datamodule.cache_dtype,
        "last_hidden": last_hidden is not None,
    }
    parts = {TRAIN: datamodule.train_rows}
    if datamodule.val_row_set is not None:
        parts[HELD_OUT] = datamodule.val_row_set
    rank, world_size = rank_and_world(trainer)
    device = trainer.strategy.root_device
    return CacheFilling(
        Builder(
            CacheSettings(**given),
            Path(datamodule.cache),
            progress=rank == 0,
            target=datamodule.target,
            parts=parts,
        ),
        rank,
        world_size,
        lambda value: float(sum_over_ranks(torch.tensor(value), device)),
    )


class _Filling:
    """A shard at its full size, zero where no row has been written."""

    def __init__(self, builder: Builder, shard: PlannedShard, rows: Sequence[TokenRow]) -> None:
        aside = builder.folder / shard.filling
        dtype, width = builder.dtype, builder.target.hidden_size
        lengths = {"hidden_states": [kept_positions(row) for row in rows]}
        widths = {"hidden_states": len(builder.layer_ids) * width}
        if builder.settings.last_hidden:
            lengths["last_hidden"] = [last_positions(row) for row in rows]
            widths["last_hidden"] = width
        with lock(builder.folder / f".{shard.file}.lock", wait=True):
            if not aside.exists():
                zeros = {
                    name: [torch.zeros(n, widths[name], dtype=dtype) for n in lengths[name]]
                    for name in lengths
                }
                write_shard(aside, rows, zeros["hidden_states"], zeros.get("last_hidden"))
        self.file = os.open(aside, os.O_RDWR)
        self._first = shard.first
        self._dtype = dtype
        self._lengths = lengths
        begins = tensor_places(aside)
        self._starts = {
            name: [
                begins[name] + rows_before * widths[name] * dtype.itemsize
                for rows_before in accumulate(lengths[name], initial=0)
            ]
            for name in lengths
        }

    def write(self, place: int, states: Tensor, last: Tensor) -> None:
        """Writes a row's (T, L*D) states, and its (T, D) last ones if the cache keeps them."""
        row = place - self._first
        for name, tensor in (("hidden_states", states), ("last_hidden", last)):
            if name in self._lengths:
                kept = tensor[: self._lengths[name][row]].to(self._dtype).cpu().contiguous()
                content = kept.view(torch.uint8).numpy().tobytes()
                written = os.pwrite(self.file, content, self._starts[name][row])
                assert written == len(content)


def tensor_places(path: Path) -> dict[str, int]:
    """Returns where each tensor's bytes begin in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_journals(folder: Path) -> np.ndarray:
    """Returns (rows, 3) int64: what all ranks' journals say is there."""
    parts = [np.zeros((0, RECORD), dtype="<i8")]
    for path in sorted(folder.glob(JOURNAL)):
        content = path.read_bytes()
        whole = len(content) - len(content) % (8 * RECORD)
        parts.append(np.frombuffer(content[:whole], dtype="<i8").reshape(-1, RECORD))
    return np.concatenate(parts)
