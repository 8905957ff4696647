"""OnlineHiddenStates: the LightningDataModule that runs the target on every batch.

Legend: B rows, S tokens per row, L tapped layers, D hidden size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data.batches import NO_PREFIX, BatchDataset
from data.cache_format import MANIFEST, TRAIN, CachedRows
from data.conversations import RowSet, load_rows
from data.features import (
    FiniteCheck,
    Keeper,
    NothingKept,
    RememberedFeatures,
    Request,
    RoundedFeatures,
    fill_batch,
)
from data.prompt_sets import Prompt, load_prompts
from data.sampler import DraftLoader, EpochBatches, Item, rank_and_world
from data.sharing import KeptFeatures, load_target, shared_features
from data.sources import check_names
from drafter.blocks import DraftBatch, LastHidden, VisiblePrefix
from drafter.errors import UserError
from drafter.packing import batches_by_length
from drafter.ranks import sum_over_ranks
from drafter.target import Target

if TYPE_CHECKING:
    from data.cache_fill import CacheFilling

KEPT_AT_ONCE = 32_768
"""Tokens, padding included, that the target runs at once for features to keep: so many that a small
one does not wait for its launches."""
KEPT_BATCHES = 8
"""No more of them than in so many of the run's batches."""


class OnlineHiddenStates(LightningDataModule):
    """Conversations plus the hidden states that a frozen target gives them, batch by batch.

    The target is a plain object of this module, outside any module tree: it is in no checkpoint, no
    optimizer and no DDP bucket. The LightningModule says what it needs (`feature_request`).

    Args:
        target: Hub id or folder of a causal LM, or a .gguf file. With a cache it may be left out.
        gguf_file: Name of the GGUF file inside the folder or repository `target`.
        target_dtype: dtype to load the target in; "auto" takes the checkpoint's (fp32 for GGUF).
        target_device_map: Spread the target over several GPUs of one process (`auto`, `balanced`,
            `sequential`), when it does not fit on one beside the drafter.
        target_revision: Hub revision.
        trust_remote_code: Run code from the target's repository.
        train_data: Files (json, jsonl, parquet; plain or .gz) or a hub id: conversations,
            prompt/response pairs or prompt_ids/response_ids. Or public data sets by name:
            `preset:NAME[/SPLIT][=PATH]`, PATH a local copy, NAME one of sharegpt, ultrachat,
            nemotron-v1, nemotron-v2, codealpaca, perfectblend (`data/presets.py`).
        train_split: Split of a hub data set; presets name their own.
        streaming: Tokenise a hub data set into an on-disk token file as it arrives.
        val_data: Like train_data; None holds out the first `val_rows` rows of train_data, and
            leaves out every other row with a prompt of theirs.
        val_rows: Rows held out (or, with val_data, rows taken of it; 0 takes all).
        limit_rows: Use at most this many rows of train_data, held-out rows included; None for all.
        max_length: Longest row in tokens; longer ones are cut, and counted.
        block_size: K. The CLI links it to model.block_size.
        num_anchors: Draft blocks per row and epoch.
        visible_prefix: Let training blocks show some of their first slots; none by default.
        batch_size: Rows per rank and micro-batch.
        val_batch_size: Rows per rank in validation; None for batch_size.
        num_workers: Loader processes.
        pad_multiple: Row lengths are padded to a multiple of this.
        pack_length: Lay the rows of a batch end to end, up to so many tokens; 0 pads each row to
            the longest. Rows never see each other, and what is scored is the same.
        keep_in_memory: Run the target once on every row, before the first step (before a row's
            first use where an epoch is cut short), and keep the features: in host RAM (true), or on
            the accelerator ("device"). For small sets: it takes L*D values a token.
        cache: Folder of a feature cache (`python -m data.cache build`): rows and features are read
            from it, and the target's frozen parts; the whole target is not loaded.
        fill_cache: Where `cache` is not complete yet, run the target, keep what it gives there, and
            read it from the second epoch on. All ranks must see the folder.
        cache_dtype: Of the features that `fill_cache` keeps, and trains on from the first step.
        shuffle_block: Shuffle blocks of so many neighbouring rows, and rows within a few blocks,
            for disks that are slow to seek; 0 shuffles all rows.
        predict_prompts: Files of prompts for `predict`.
        predict_limit: Prompts of each of these files; None for all.
        seed: Of order and anchors. The CLI links it to seed_everything.
    """

    def __init__(
        self,
        target: str = "",
        train_data: str | list[str] = "",
        gguf_file: str | None = None,
        target_dtype: str = "auto",
        target_device_map: str | None = None,
        target_revision: str | None = None,
        trust_remote_code: bool = False,
        train_split: str = "train",
        streaming: bool = False,
        val_data: str | list[str] | None = None,
        val_rows: int = 0,
        limit_rows: int | None = None,
        max_length: int = 2048,
        block_size: int = 16,
        num_anchors: int = 48,
        visible_prefix: VisiblePrefix = NO_PREFIX,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        pad_multiple: int = 1,
        pack_length: int = 0,
        keep_in_memory: bool | Literal["device"] = False,
        cache: str | None = None,
        fill_cache: bool = False,
        cache_dtype: str = "bfloat16",
        shuffle_block: int = 0,
        predict_prompts: str | list[str] | None = None,
        predict_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target_path = target
        self.gguf_file = gguf_file
        self.target_dtype = target_dtype
        self.target_device_map = target_device_map
        self.target_revision = target_revision
        self.trust_remote_code = trust_remote_code
        self.train_data = train_data
        self.train_split = train_split
        self.streaming = streaming
        self.val_data = val_data
        self.val_rows = val_rows
        self.limit_rows = limit_rows
        self.max_length = max_length
        self.block_size = block_size
        self.num_anchors = num_anchors
        self.visible_prefix = visible_prefix
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.pad_multiple = pad_multiple
        self.pack_length = pack_length
        self.keep_in_memory = keep_in_memory
        self.cache = cache
        self.fill_cache = fill_cache
        self.cache_dtype = cache_dtype
        self.shuffle_block = shuffle_block
        self.predict_prompts = predict_prompts
        self.predict_limit = predict_limit
        self.seed = seed
        self._target: Target | None = None
        self._train_rows: RowSet | None = None
        self._val_rows: RowSet | None = None
        self._fills = False
        self._kept: KeptFeatures = {}
        self._check = FiniteCheck()
        self._filling: CacheFilling | None = None

    @property
    def target(self) -> Target:
        """The frozen target, loaded by `setup`."""
        assert self._target is not None, "setup() has not run"
        return self._target

    def use_target(self, target: Target) -> None:
        """Gives the module a target that is loaded already."""
        self._target = target

    @property
    def train_rows(self) -> RowSet:
        """The rows trained on, loaded by `setup("fit")`."""
        assert self._train_rows is not None, "setup('fit') has not run"
        return self._train_rows

    @property
    def val_row_set(self) -> RowSet | None:
        """The held-out rows, or None."""
        return self._val_rows

    def setup(self, stage: str) -> None:
        """Loads the target onto this rank's device, and the rows that `stage` needs."""
        if self.fill_cache and (not self.cache or self.keep_in_memory):
            raise UserError(
                "--data.fill_cache needs a folder (--data.cache), and keep_in_memory off: the "
                "cache keeps the features."
            )
        self._fills = self.fill_cache and not self._cache_is_complete()
        if self._target is None and self.cache and not self._fills:
            self._open_cache("cpu" if self.trainer is None else self.trainer.strategy.root_device)
        if self._target is None:
            if not self.target_path:
                raise UserError("No target: set --data.target, or --data.cache to a built cache.")
            device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
            if self.target_device_map and rank_and_world(self.trainer)[1] > 1:
                raise UserError(
                    "--data.target_device_map spreads one process's target over all GPUs, and this "
                    "run has several processes; set trainer.devices to 1, or build a feature cache."
                )
            # a typo is told before minutes of loading
            check_names((self.train_data, self.val_data), self.train_split)
            self._target = load_target(
                self.target_path,
                gguf_file=self.gguf_file,
                dtype=self.target_dtype,
                device=device,
                revision=self.target_revision,
                trust_remote_code=self.trust_remote_code,
                device_map=self.target_device_map,
            )
            shared = shared_features(self._target, self._rows_identity())
            self._kept = self._kept if shared is None else shared
        if stage in ("fit", "validate", "test") and self._train_rows is None:
            self._load_rows(training=stage == "fit")

    def _cache_is_complete(self) -> bool:
        """Returns whether every rank sees a complete cache."""
        complete = torch.tensor(float((Path(self.cache or "") / MANIFEST).exists()))
        device = None if self.trainer is None else self.trainer.strategy.root_device
        return float(sum_over_ranks(complete, device)) == rank_and_world(self.trainer)[1]

    def _open_cache(self, device: str | torch.device) -> None:
        from data.cached import open_cache

        assert self.cache is not None
        opened = open_cache(
            Path(self.cache), device, target=self.target_path, target_dtype=self.target_dtype
        )
        self._target = opened.target
        self._train_rows, self._val_rows = opened.train, opened.held_out
        made_of = opened.manifest.identity["settings"]
        for name in ("train_data", "val_data", "val_rows", "limit_rows", "max_length"):
            if getattr(self, name) != made_of[name]:
                rank_zero_info(
                    f"[cache] data.{name} is the cache's {made_of[name]!r}, not "
                    f"{getattr(self, name)!r}"
                )
        kept_in = opened.manifest.identity["dtype"]
        if self.fill_cache and self.cache_dtype != kept_in:
            rank_zero_info(
                f"[cache] features are {kept_in} as the cache has them, not {self.cache_dtype}"
            )
        rank_zero_info(f"Training rows: {opened.train.report}")

    def _keep_all(self, dataset: BatchDataset) -> None:
        """Runs the target on all training rows that are not kept yet, those of like length at once.

        Much faster than batch by batch; and which rows run together, so how their features are
        rounded, is the same wherever a run resumes. Where epochs are cut short, or a rank sees a
        part of the rows, features are computed when a batch asks for them.
        """
        trainer, rows = self.trainer, self.train_rows
        if not self.keep_in_memory or trainer is None or dataset.features is not None:
            return
        layer_ids, last_hidden = trainer.lightning_module.feature_request()
        last = last_hidden is not None
        keeper = self._keeper(last_hidden)
        assert isinstance(keeper, RememberedFeatures)
        keeper.keep_only(last)
        if trainer.world_size > 1 or trainer.fit_loop.done:
            return
        whole = -(-len(rows) // self.batch_size)
        steps = whole if trainer.max_steps < 0 else trainer.max_steps
        if min(self.batches_per_epoch(), steps * trainer.accumulate_grad_batches) < whole:
            return
        lengths = [rows.tokens(i) for i in range(len(rows))]
        # what a batch takes is some measure of what the target's layers may take
        most = min(KEPT_AT_ONCE, KEPT_BATCHES * self.batch_size * max(lengths, default=1))
        groups = [
            group
            for group in batches_by_length(lengths, most)
            if not keeper.holds(TRAIN, layer_ids, [rows[i].sample_id for i in group], last)
        ]
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero or not groups
        with tqdm(
            total=sum(map(len, groups)), desc="features to keep", unit="row", disable=hidden
        ) as bar:
            for group in groups:
                items = [Item(row, 0, scored=False) for row in group]
                batch = dataset[items].to(self.target.device)
                keeper.features(Request(self._check, batch, self.target, layer_ids, last, TRAIN))
                bar.update(len(group))

    def _read_if_filled(self, dataset: BatchDataset) -> None:
        """Reads features from the cache that this run has filled, once it is complete."""
        manifest = None if self._filling is None else self._filling.finish()
        if manifest is not None:
            assert self._filling is not None
            dataset.features = CachedRows(self._filling.folder, manifest.part(TRAIN))
            self._filling = None

    def teardown(self, stage: str) -> None:
        """Makes a cache of what a single epoch has filled; what comes next reads it."""
        try:
            self._finish_filling(stage)
        finally:
            self._check.settle()

    def _finish_filling(self, stage: str) -> None:
        if not self._fills or stage != "fit":
            return
        if self._filling is not None:
            self._filling.finish()
            self._filling.close()
            self._filling = None
        if self._cache_is_complete():
            self._target = self._train_rows = self._val_rows = None

    def on_exception(self, exception: BaseException) -> None:
        """Lets other runs at a cache that this one does not fill any further."""
        if self._filling is not None:
            self._filling.close()

    def state_dict(self) -> dict[str, Any]:
        """Has no state; what was kept before a checkpoint must outlast the process, though."""
        if self._filling is not None:
            self._filling.flush()
        return {}

    def _rows_identity(self) -> tuple[Any, ...]:
        """What decides which tokens a sample id stands for."""
        return (
            str(self.train_data),
            self.train_split,
            str(self.val_data),
            self.val_rows,
            self.limit_rows,
            self.max_length,
            self.keep_in_memory,
        )

    def _load_rows(self, training: bool) -> None:
        if not self.train_data:
            raise UserError(
                "No training data: set --data.train_data to files, a hub id or a preset."
            )
        held_out = self.val_rows if self.val_data is None else 0
        if self.val_data is not None:
            self._val_rows = self._rows(self.val_data, skip=0, limit=self.val_rows or None)
        elif held_out:
            self._val_rows = self._rows(self.train_data, skip=0, limit=held_out)
        if self._val_rows is not None:
            rank_zero_info(f"Held-out rows: {self._val_rows.report}")
        if training:
            limit = None if self.limit_rows is None else self.limit_rows - held_out
            # another answer to a held-out prompt is no more for training than the prompt is
            own = self._val_rows if held_out else None
            self._train_rows = self._rows(self.train_data, held_out, limit, held_out=own)
            rank_zero_info(f"Training rows: {self._train_rows.report}")

    def _rows(
        self,
        source: str | list[str],
        skip: int,
        limit: int | None,
        held_out: RowSet | None = None,
    ) -> RowSet:
        return load_rows(
            source,
            self.target.tokenizer,
            vocab_size=self.target.vocab_size,
            max_length=self.max_length,
            target_max_length=self.target.max_length,
            eos_token_ids=self.target.eos_token_ids,
            skip=skip,
            limit=limit,
            split=self.train_split,
            streaming=self.streaming,
            held_out=held_out,
        )

    def train_dataloader(self) -> DraftLoader:
        """Returns this rank's resumable loader."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if self._fills and self._filling is None:
            from data.cache_fill import begin_filling

            self._filling = begin_filling(self)
        return self._loader(self.train_rows, self.batch_size, training=True, accumulate=accumulate)

    def val_dataloader(self) -> DraftLoader | list[Any]:
        """Returns this rank's share of the held-out rows, in order, with fixed anchors."""
        if self._val_rows is None:
            return []
        return self._loader(self._val_rows, self.val_batch_size, training=False)

    def test_dataloader(self) -> DraftLoader | list[Any]:
        """Returns the held-out rows, as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Returns this rank's share of the prompts, one at a time."""
        if not self.predict_prompts:
            raise UserError("predict has no prompts: set --data.predict_prompts to a file.")
        rank, world_size = rank_and_world(self.trainer)
        if self.trainer is not None and hasattr(self.trainer.lightning_module, "gather"):
            self.trainer.lightning_module.gather()  # type: ignore[operator]
        prompts = load_prompts(
            self.predict_prompts,
            self.target.tokenizer,
            vocab_size=self.target.vocab_size,
            limit=self.predict_limit,
        )
        own = prompts[rank::world_size]
        # a rank may have none
        self.allow_zero_length_dataloader_with_multiple_devices = True
        return DataLoader(own, batch_size=None, collate_fn=lambda prompt: prompt)  # type: ignore[arg-type]

    def steps_per_epoch(self) -> int:
        """Returns optimizer steps per epoch, from sizes alone (no loader is touched)."""
        accumulate: int = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return -(-self.batches_per_epoch() // accumulate)

    def batches_per_epoch(self) -> int:
        """Returns micro-batches per epoch and rank, within trainer.limit_train_batches."""
        _, world_size = rank_and_world(self.trainer)
        batches = -(-len(self.train_rows) // (self.batch_size * world_size))
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def _last_hidden_asked(self) -> bool:
        """Whether the run's loss reads what the head reads."""
        ask = getattr(getattr(self.trainer, "lightning_module", None), "feature_request", None)
        return ask is not None and ask()[1] is not None

    def _loader(
        self, rows: RowSet, batch_size: int, *, training: bool, accumulate: int = 1
    ) -> DraftLoader:
        rank, world_size = rank_and_world(self.trainer)
        last_hidden = self._last_hidden_asked()
        if last_hidden and len(rows) and isinstance(rows.rows, CachedRows):
            rows.rows.last_hidden(0)  # here, not in a worker process after minutes
        dataset = BatchDataset(
            rows,
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            seed=self.seed,
            pad_multiple=self.pad_multiple,
            pack_length=self.pack_length,
            resample=training,
            features=rows.rows if isinstance(rows.rows, CachedRows) else None,
            last_hidden=last_hidden,
            visible_prefix=self.visible_prefix if training else NO_PREFIX,
        )
        if training:
            self._keep_all(dataset)
        batches = EpochBatches(
            len(rows),
            batch_size,
            seed=self.seed,
            shuffle=training,
            rank=rank,
            world_size=world_size,
            block=self.shuffle_block,
            tokens=rows.tokens if training else None,
        )
        return DraftLoader(
            dataset,
            batches,
            accumulate=accumulate,
            limit=self.batches_per_epoch() if training else None,
            before_epoch=partial(self._read_if_filled, dataset) if training else None,
            num_workers=self.num_workers,
            pin_memory=torch.device(self.target.device).type == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a `DraftBatch`; a prompt has nothing to move."""
        if isinstance(batch, Prompt):
            return batch
        if isinstance(batch, DraftBatch):
            # Lightning would wait for the device here, and could not prepare the step meanwhile
            return batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds the target's hidden states to a `DraftBatch` that is on the device already."""
        if not isinstance(batch, DraftBatch) or batch.hidden_states is not None:
            return batch
        assert self.trainer is not None
        layer_ids, last_hidden = self.trainer.lightning_module.feature_request()
        row_set = TRAIN if self.trainer.training or self._val_rows is None else "val"
        return self.add_features(batch, layer_ids, last_hidden, row_set)

    def add_features(
        self,
        batch: DraftBatch,
        layer_ids: tuple[int, ...],
        last_hidden: LastHidden = None,
        row_set: str = TRAIN,
    ) -> DraftBatch:
        """Fills `hidden_states` (B, S, L*D) and, if asked, `last_hidden` (B, S, D).

        Where features are kept in memory and soft labels are all that is needed of last_hidden, it
        fills `soft_labels` in its place.

        Args:
            batch: On the target's device.
            layer_ids: Tapped layers.
            last_hidden: What a loss or metric needs of it.
            row_set: Which row set the sample ids count in.

        Raises:
            UserError: A hidden state of this batch (on a GPU: of the one before, unless features
                are kept) is NaN or infinite; names row, layer and position.
        """
        last = last_hidden is not None
        keeper = self._keeper(last_hidden)
        return fill_batch(batch, self.target, layer_ids, last, row_set, keeper, self._check)

    def _keeper(self, last_hidden: LastHidden) -> Keeper:
        if self._fills:
            return RoundedFeatures(getattr(torch, self.cache_dtype), self._filling)
        if self.keep_in_memory:
            on_device = self.keep_in_memory == "device"
            head = None if last_hidden == "states" else self.target.head
            return RememberedFeatures(self._kept, on_device, head)
        return NothingKept()
