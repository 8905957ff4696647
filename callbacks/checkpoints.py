"""Checkpoints of a run: the best by accepted length, and the last one written.

Lightning-traps 7: one checkpoint with a monitor, one by steps without; `last` never follows the
monitor (field report E8).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from drafter.files import replace_atomic

MONITOR = "val/accepted_length"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: what is there is always whole.

    Lightning's own writer goes through the system's temporary folder; where that is another disk,
    a kill or a full disk leaves a torn file under the checkpoint's name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes one file; the old one stays until the new one is on the disk."""
        if "://" in str(path):  # a remote file system has its own ways
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        replace_atomic(Path(path), lambda aside: torch.save(checkpoint, aside))


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the drafter with the longest accepted length so far.

    Args:
        dirpath: Folder; the CLI sets it to <run_dir>/checkpoints.
        monitor: Logged metric to maximise.
    """

    def __init__(self, dirpath: str | None = None, monitor: str = MONITOR) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=False,  # else Lightning would not save after validation
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the metric is known after validation only."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if the metric was logged: without verification there is no best drafter."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: every n steps, at an epoch's last step (so before its validation, which a
    preempted run may not survive) and again after validation.

    Args:
        dirpath: Folder; the CLI sets it to <run_dir>/checkpoints.
        every_n_steps: Optimizer steps between saves within an epoch; 0 for epoch ends only.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int = 500) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            monitor=None,
            save_top_k=1,
            save_on_train_epoch_end=False,  # else Lightning would not save after validation
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._flush_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the step of a resumed run as saved."""
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return Path(str(self.dirpath)) / "last.ckpt"

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves where due; only at optimizer steps, never inside an accumulation window."""
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:
            return
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0 and step > 0
        # not in on_train_end: the loop's state then says that a broken-off epoch is complete
        ends = trainer.should_stop or 0 < trainer.max_steps <= step
        if due or ends or batch_idx + 1 == trainer.num_training_batches:
            self.save_now(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts the curves up to a checkpoint on the disk: a kill would leave a gap in them."""
        if self._flush_due:
            self._flush_due = False
            flush = getattr(getattr(trainer.logger, "experiment", None), "flush", None)
            if flush is not None:
                flush()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves again after validation: metrics and the best checkpoint's state have moved on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run:
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the epoch's last step was saved already."""

    def save_now(self, trainer: Trainer) -> None:
        """Writes last.ckpt; all ranks call it together."""
        self._saved_step = trainer.global_step
        self._flush_due = True  # Lightning logs this step after the callbacks
        self._save_checkpoint(trainer, str(self.path))
