"""Builds a feature cache: any number of processes, shard by shard, on from where a kill left it.

Legend: B rows of a batch, S tokens, L tapped layers, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data.cache_format import (
    HELD_OUT,
    MANIFEST,
    REPLAY,
    TRAIN,
    Manifest,
    Shard,
    check_shard,
    file_sha256,
    kept_positions,
    last_positions,
    read_manifest,
    write_shard,
)
from data.online import OnlineHiddenStates
from data.prompt_sets import held_out_prompts
from data.render import fingerprint
from data.rows import RowSet, TokenRow
from data.sources import check_names
from data.stored_target import StoredTarget, save_target
from drafter.blocks import candidates
from drafter.errors import UserError
from drafter.evaluation.trajectories import (
    Trajectory,
    TrajectorySettings,
    generate_trajectories,
)
from drafter.files import file_stamp, lock, write_atomic
from drafter.layer_ids import assert_finite_features, check_layer_ids, default_layer_ids
from drafter.packing import batches_by_length, pad_rows
from drafter.sampling import argmax
from drafter.target import Target

PLAN = "plan.json"
FILLING = ".filling"
"""Ends the name of a shard that a run is filling."""
POLL_SECONDS = 0.5
HEADER_BYTES = 800
"""Of a shard's safetensors header, about."""


@dataclass(frozen=True)
class CacheSettings:
    """What a cache is made of; named as in `OnlineHiddenStates` and `DrafterModule`.

    Attributes:
        target: Hub id, folder or .gguf file.
        train_data: Files, a hub id or presets.
        gguf_file: Inside the target's folder.
        target_dtype: The target runs in it.
        target_revision: Hub revision.
        trust_remote_code: Run code from the target's repository.
        train_split: Of a hub data set.
        val_data: Held-out rows; None takes the first `val_rows` of train_data.
        val_rows: How many.
        limit_rows: Rows of train_data, held-out ones included; None for all.
        max_length: Longest row in tokens.
        target_layer_ids: Tapped layers; None for `num_taps` evenly spread ones.
        num_taps: L.
        dtype: Of the features on disk.
        last_hidden: Also keep what the head reads, for losses that need the target's distribution.
        shard_gb: Size of a shard.
        prompts_per_set: Held-out prompts whose trajectories are kept; 0 for all.
        max_new_tokens: Limit of a trajectory.
        verify_batch_size: Prompts answered together; as `verification.batch_size`.
    """

    target: str
    train_data: str | list[str]
    gguf_file: str | None = None
    target_dtype: str = "auto"
    target_revision: str | None = None
    trust_remote_code: bool = False
    train_split: str = "train"
    val_data: str | list[str] | None = None
    val_rows: int = 0
    limit_rows: int | None = None
    max_length: int = 2048
    target_layer_ids: list[int] | None = None
    num_taps: int = 5
    dtype: str = "bfloat16"
    last_hidden: bool = False
    shard_gb: float = 2.0
    prompts_per_set: int = 64
    max_new_tokens: int = 128
    verify_batch_size: int = 32


@dataclass(frozen=True)
class PlannedShard:
    """Which rows of a part go into a shard, and how large it will be."""

    number: int
    part: str
    first: int
    last: int
    bytes: int

    @property
    def file(self) -> str:
        """Its name."""
        return f"{'replay' if self.part == REPLAY else 'shard'}-{self.number:05d}.safetensors"

    @property
    def filling(self) -> str:
        """Its name while a run is filling it."""
        return f"{self.file}{FILLING}"


class Builder:
    """Everything that a build needs in memory: the target, the rows, and where they go.

    Args:
        settings: What to build.
        folder: Of the cache.
        device: The target runs on it.
        batch_tokens: Tokens that the target runs at once, padding included.
        budget_gb: Refuse a cache that is larger; None for what the disk has.
        progress: Show bars.
        target: Loaded already, as the settings say.
        parts: Rows by part, likewise.

    Raises:
        UserError: The folder holds a cache of other settings, or what `OnlineHiddenStates` raises.
    """

    def __init__(
        self,
        settings: CacheSettings,
        folder: Path,
        *,
        device: str = "cpu",
        batch_tokens: int = 8192,
        budget_gb: float | None = None,
        progress: bool = True,
        target: Target | None = None,
        parts: dict[str, RowSet] | None = None,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.batch_tokens = batch_tokens
        self.budget_gb = budget_gb
        self.progress = progress
        self._computing = threading.Lock()
        if settings.dtype not in ("bfloat16", "float16", "float32"):
            raise UserError(f"dtype is {settings.dtype!r}; choose bfloat16, float16 or float32.")
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        # a typo is told before minutes of loading
        check_names((settings.train_data, settings.val_data), settings.train_split)
        self.target = target or Target.load(
            settings.target,
            gguf_file=settings.gguf_file,
            dtype=settings.target_dtype,
            device=device,
            revision=settings.target_revision,
            trust_remote_code=settings.trust_remote_code,
        )
        chosen = settings.target_layer_ids
        if chosen is None:
            chosen = default_layer_ids(self.target.num_layers, settings.num_taps)
        check_layer_ids(chosen, self.target.num_layers)
        self.layer_ids = tuple(chosen)
        self.parts = parts or self._load_rows()
        self.report = {name: rows.report.to_dict() for name, rows in self.parts.items()}
        self.trajectories: list[Trajectory] = []
        self.identity = self._identity()

    def _load_rows(self) -> dict[str, RowSet]:
        given = asdict(self.settings)
        if not given["train_data"]:
            raise UserError("no rows to build a cache of: pass --train_data, or --from RUN.yaml.")
        wanted = "target train_data gguf_file target_dtype train_split val_data val_rows"
        wanted += " limit_rows max_length"
        datamodule = OnlineHiddenStates(**{name: given[name] for name in wanted.split()})
        datamodule.use_target(self.target)
        datamodule.setup("fit")
        parts = {TRAIN: datamodule.train_rows}
        if datamodule.val_row_set is not None:
            parts[HELD_OUT] = datamodule.val_row_set
        return parts

    def _identity(self) -> dict[str, Any]:
        target, settings = self.target, self.settings
        return {
            "settings": asdict(settings),
            "target": {
                "path": target.path,
                "gguf_file": target.gguf_file,
                "revision": settings.target_revision,
                "fingerprint": target.fingerprint,
                "stamp": file_stamp(target.path),
                "dtype": str(target.dtype).removeprefix("torch."),
                "num_layers": target.num_layers,
            },
            **fingerprint(target.tokenizer),
            "rows": {name: rows_digest(rows) for name, rows in self.parts.items()},
            "layer_ids": list(self.layer_ids),
            "hidden_size": target.hidden_size,
            "dtype": settings.dtype,
            "last_hidden": settings.last_hidden,
        }

    # ------------------------------------------------------------------ plan

    def plan(self) -> list[PlannedShard]:
        """Returns all shards: rows in order, each shard filled up to `shard_gb`."""
        shards: list[PlannedShard] = []
        self._generate()
        parts: dict[str, Sequence[TokenRow]] = {**self.parts, REPLAY: self._replay_rows()}
        for part, rows in parts.items():
            first, size = 0, HEADER_BYTES
            for place, row in enumerate(rows):
                own = self._row_bytes(row, whole=part == REPLAY)
                if size + own > self.settings.shard_gb * 1e9 and place > first:
                    shards.append(PlannedShard(len(shards), part, first, place, size))
                    first, size = place, HEADER_BYTES
                size += own
            if len(rows) > first:
                shards.append(PlannedShard(len(shards), part, first, len(rows), size))
        return shards

    def estimate_bytes(self, shards: Sequence[PlannedShard]) -> int:
        """Returns what the whole cache takes, in bytes."""
        target = self.target
        head = target.head.weight
        tied = target.embedding_weight.data_ptr() == head.data_ptr()
        frozen = head.numel() * head.element_size() * (1 if tied else 2)
        return sum(shard.bytes for shard in shards) + frozen

    def _row_bytes(self, row: TokenRow, whole: bool) -> int:
        width, item = self.target.hidden_size, self.dtype.itemsize
        tokens = len(row.input_ids)
        positions = tokens if whole else kept_positions(row)
        size = positions * len(self.layer_ids) * width * item + tokens * 5 + 24
        if self.settings.last_hidden:
            size += (tokens if whole else last_positions(row)) * width * item + 8
        return size

    def _generate(self) -> None:
        if HELD_OUT in self.parts and not self.trajectories:
            settings = self.settings
            limit = settings.prompts_per_set or None
            room = self.target.max_length - settings.max_new_tokens
            prompts = held_out_prompts(self.parts[HELD_OUT], limit)
            self.trajectories = generate_trajectories(
                self.target,
                [prompt for prompt in prompts if 0 < len(prompt.ids) <= room],
                TrajectorySettings(settings.max_new_tokens),
                folder=self.folder / "trajectories",
                batch_size=settings.verify_batch_size,
                progress=self.progress,
            )

    def _replay_rows(self) -> list[TokenRow]:
        rows = []
        for place, trajectory in enumerate(self.trajectories):
            ids = torch.tensor(trajectory.tokens, dtype=torch.int32).numpy()
            supervised = torch.arange(len(ids)).numpy() >= len(trajectory.prompt.ids)
            rows.append(TokenRow(place, ids, supervised))
        return rows

    # ------------------------------------------------------------------ building

    def run(self) -> Manifest:
        """Builds what is missing, or waits for the processes that build it; returns the manifest.

        Raises:
            UserError: Other settings, no room, or a state that is not finite.
        """
        begun = time.perf_counter()
        shards = self.prepare()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        start = rank * len(shards) // max(1, world)
        self.build([*shards[start:], *shards[:start]])
        while not (self.folder / MANIFEST).exists():
            with lock(self.folder / "finish.lock") as free:
                if free and not (self.folder / MANIFEST).exists():
                    self.finish(shards, time.perf_counter() - begun)
            if not (self.folder / MANIFEST).exists():
                time.sleep(POLL_SECONDS)
        return read_manifest(self.folder)

    def prepare(self) -> list[PlannedShard]:
        """Makes the folder the cache's own and returns the plan, after a look at the room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        with lock(self.folder / "trajectories.lock", wait=True):
            shards = self.plan()
        self._check_room(shards)
        return shards

    def build(self, shards: Sequence[PlannedShard]) -> None:
        """Builds those shards that are missing, or waits for the processes that are at them."""
        total = sum(shard.bytes for shard in shards)
        pool = ThreadPoolExecutor(2)  # one shard is written and hashed while the next is computed
        try:
            with tqdm(
                total=total, desc="features", unit="B", unit_scale=True, disable=not self.progress
            ) as bar:
                waiting = list(shards)
                while waiting:
                    left = []
                    there = pool.map(self._build_if_free, waiting)
                    for planned, is_there in zip(waiting, there, strict=True):
                        if is_there:
                            bar.update(planned.bytes)
                        else:
                            left.append(planned)
                    waiting = left
                    if waiting:  # another process is at them
                        time.sleep(POLL_SECONDS)
        finally:
            pool.shutdown(cancel_futures=True)

    def _claim(self) -> None:
        """Says what this folder holds; refuses one that holds something else."""
        path = self.folder / PLAN
        with lock(self.folder / "plan.lock"):
            if not path.exists():
                write_atomic(path, json.dumps(self.identity, indent=1))
                return
        there = json.loads(path.read_text())
        differing = differences(there, self.identity)
        if differing:
            raise UserError(
                f"{self.folder} holds a cache of other settings ({'; '.join(differing)}); choose "
                "another folder, or delete it."
            )

    def _check_room(self, shards: Sequence[PlannedShard]) -> None:
        whole = self.estimate_bytes(shards)
        left = whole - sum(map(self._bytes_there, shards))
        free = shutil.disk_usage(self.folder).free
        tokens = sum(row.tokens for row in self._reports())
        print(
            f"the cache will take {whole / 1e9:.3f} GB in {len(shards)} shards, "
            f"{whole / max(1, tokens):.0f} bytes a token; {left / 1e9:.3f} GB are still to be "
            f"written, {free / 1e9:.1f} GB are free",
            flush=True,
        )
        if self.budget_gb is not None and whole > self.budget_gb * 1e9:
            raise UserError(
                f"the cache needs {whole / 1e9:.3f} GB, more than the budget of "
                f"{self.budget_gb:g} GB: fewer rows, fewer taps, or a larger --budget-gb."
            )
        if left > free:
            raise UserError(
                f"the cache needs {left / 1e9:.1f} GB more, and the disk of {self.folder} has "
                f"{free / 1e9:.1f} GB free: another folder, fewer rows or fewer taps."
            )

    def _bytes_there(self, planned: PlannedShard) -> int:
        """Returns what a shard takes already; one that a run is filling has its full size."""
        aside = self.folder / planned.filling
        return planned.bytes if self.done(planned) or aside.exists() else 0

    def _reports(self) -> list[Any]:
        return [rows.report for rows in self.parts.values()]  # type: ignore[attr-defined]

    def done(self, planned: PlannedShard) -> bool:
        """Returns whether a shard is there, whole."""
        sidecar = self._sidecar(planned)
        return sidecar is not None and check_shard(self.folder, sidecar) is None

    def _sidecar(self, planned: PlannedShard) -> Shard | None:
        path = (self.folder / planned.file).with_suffix(".json")
        return Shard(**json.loads(path.read_text())) if path.exists() else None

    def _build_if_free(self, planned: PlannedShard) -> bool:
        if self.done(planned):
            return True
        with lock(self.folder / f".{planned.file}.lock") as free:
            if free and not self.done(planned):
                self._build(planned)
        return self.done(planned)

    def _build(self, planned: PlannedShard) -> None:
        replay = planned.part == REPLAY
        source = self._replay_rows() if replay else self.parts[planned.part]
        rows = [source[place] for place in range(planned.first, planned.last)]
        device = self.target.device
        on_its_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._computing, on_its_device:  # a thread begins on device 0
            states, lasts, scored, equal = self._compute(rows, replay)
        write_shard(self.folder / planned.file, rows, states, lasts)
        self.describe_shard(planned, rows, sum(map(len, states)), scored, equal)

    def _compute(
        self, rows: Sequence[TokenRow], replay: bool
    ) -> tuple[list[Tensor], list[Tensor] | None, int, int]:
        """Returns what a shard keeps of rows, tokens scored, and those the target would write."""
        keep_last = self.settings.last_hidden
        states = [torch.empty(0)] * len(rows)
        lasts = [torch.empty(0)] * len(rows) if keep_last else None
        scored = equal = 0
        lengths = [len(row.input_ids) for row in rows]
        for batch in batches_by_length(lengths, self.batch_tokens):
            own = [rows[i] for i in batch]
            found = self._features(own)
            if not replay:
                for hits, total in self.argmax_hits(own, found.last_hidden):
                    equal, scored = equal + hits, scored + total
            # the whole batch at once: every copy waits for the device
            hidden = found.hidden_states.to(self.dtype).cpu()
            last = found.last_hidden.to(self.dtype).cpu() if keep_last else None
            for place, i in enumerate(batch):
                tokens = lengths[i]
                states[i] = hidden[place, : tokens if replay else kept_positions(rows[i])]
                if lasts is not None and last is not None:
                    lasts[i] = last[place, : tokens if replay else last_positions(rows[i])]
        return states, lasts, scored, equal

    def describe_shard(
        self,
        planned: PlannedShard,
        rows: Sequence[TokenRow],
        positions: int,
        scored: int,
        equal: int,
    ) -> None:
        """Writes what is said of a shard whose file is complete."""
        path = self.folder / planned.file
        shard = Shard(
            planned.file,
            planned.part,
            planned.first,
            len(rows),
            positions,
            sum(len(row.input_ids) for row in rows),
            path.stat().st_size,
            file_sha256(path),
            scored,
            equal,
        )
        write_atomic(path.with_suffix(".json"), json.dumps(asdict(shard), indent=1))

    def _features(self, rows: Sequence[TokenRow]) -> Any:
        ids, documents = pad_rows([row.input_ids for row in rows], self.target.device)
        found = self.target.features(ids, documents, self.layer_ids, last_hidden=True)
        names = torch.tensor([row.sample_id for row in rows])
        assert_finite_features(found.hidden_states, self.layer_ids, names)
        return found

    def argmax_hits(self, rows: Sequence[TokenRow], last_hidden: Tensor) -> list[tuple[int, int]]:
        """Returns (scored tokens that the target would have written, scored tokens) of each row.

        Args:
            rows: B of them.
            last_hidden: (B, S, D), what the head reads.
        """
        before = [torch.from_numpy(candidates(row.supervised)) for row in rows]
        labels = [
            torch.from_numpy(row.input_ids)[own + 1] for row, own in zip(rows, before, strict=True)
        ]
        counts = [len(own) for own in before]
        device = last_hidden.device
        place = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)).to(device)
        read_TD = last_hidden[place, torch.cat(before).to(device)]
        hits = torch.zeros(len(rows), dtype=torch.long, device=device)
        size = self.target.head.chunk_rows()
        parts = (part.split(size) for part in (read_TD, torch.cat(labels).to(device), place))
        for read, wanted, row in zip(*parts, strict=True):
            hits.index_add_(0, row, (argmax(self.target.head.logits(read)) == wanted).long())
        return list(zip(hits.tolist(), counts, strict=True))

    def finish(self, shards: Sequence[PlannedShard], seconds: float) -> None:
        """Writes the target's frozen parts and, last, the manifest; all shards must be there."""
        frozen = save_target(self.target, self.folder / StoredTarget.FOLDER)
        found = [self._sidecar(planned) for planned in shards]
        assert all(found)
        manifest = Manifest(
            self.identity,
            tuple(shard for shard in found if shard is not None),
            self.report,
            frozen,
            seconds,
        )
        manifest.write(self.folder)


def rows_digest(rows: Sequence[TokenRow]) -> str:
    """Returns 16 hex digits over the tokens and masks of rows: files change under their names."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([row.sample_id, len(row.input_ids)], dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(row.input_ids, dtype=np.int32).tobytes())
        digest.update(np.packbits(row.supervised).tobytes())
    return digest.hexdigest()[:16]


def differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns "name: there, not asked" for everything that differs between two identities."""
    lines: list[str] = []
    for name in sorted(there.keys() | asked.keys()):
        a, b = there.get(name), asked.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} there, {b} asked for")
    return lines
