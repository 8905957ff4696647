"""Says what a step will take of the device's memory, before the first one, and what that took."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from drafter.attention import choose_attention
from drafter.draft_vocabulary import ReducedHead
from drafter.memory import MemoryEstimate, StepSizes, estimate_step, logit_buffers
from drafter.sharding import is_sharded

ROOM = 0.9
"""Share of the free memory that a step may take before a warning: fragments need some."""


class MemoryReport(Callback):
    """Prints an estimate of a step of the longest rows, and warns if it does not fit.

    Args:
        show: Print it.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.estimate: MemoryEstimate | None = None
        self._before: int | None = None
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the estimate; on a GPU also what is free."""
        device = trainer.strategy.root_device
        self.estimate = estimate = estimate_run(trainer, pl_module)
        shown, advice = estimate.lines()
        needed = estimate.total - estimate.weights  # the weights are there already
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free, whole = torch.cuda.mem_get_info(device)
            shown += f"; {free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
            if pl_module.hparams.cuda_graphs:
                shown += "; recorded steps (model.cuda_graphs) take two to four times as much"
            if needed > ROOM * free:
                shown += (
                    f"\n[memory] WARNING: a step of the longest rows may not fit. {advice} "
                    "(data.keep_in_memory: false frees what features take)"
                )
            torch.cuda.reset_peak_memory_stats(device)
            there = estimate.weights + (estimate.optimizer if trainer.optimizers[0].state else 0)
            self._before = torch.cuda.memory_allocated(device) - there
            self._first = trainer.global_step
        if not (self.show and trainer.is_global_zero):
            return
        print(shown, flush=True)
        writer = getattr(trainer.logger, "experiment", None)
        if writer is not None and hasattr(writer, "add_text"):
            writer.add_text("memory/estimate", shown, global_step=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prints once what a step really takes: the second, when the optimizer's state is there."""
        if self._before is None or not trainer.is_global_zero or not self.show:
            return
        if trainer.global_step < self._first + 2:
            return
        taken = torch.cuda.max_memory_allocated(trainer.strategy.root_device) - self._before
        self._before = None
        print(f"[memory] a step took {taken / 1e9:.2f} GB", flush=True)


def estimate_run(trainer: Trainer, module: Any) -> MemoryEstimate:
    """Returns what a step of a run takes, if its rows are the longest of the data.

    Args:
        trainer: Of the run, set up.
        module: A `DrafterModule` with its drafter.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    drafter, head, whole = module.drafter, module.head, bool(module.loss.reads_whole)
    # with a reduced draft vocabulary, scores of whole distributions still make p over all tokens
    if isinstance(head, ReducedHead):
        head = head.whole if whole else head.rows
    device = trainer.strategy.root_device
    longest = datamodule.train_rows.report.longest or datamodule.max_length
    tokens = -(-longest // datamodule.pad_multiple) * datamodule.pad_multiple
    rows, blocks = datamodule.batch_size, min(datamodule.num_anchors, longest)
    if datamodule.pack_length > longest:  # as if all rows were of that length
        in_a_row = min(rows, datamodule.pack_length // longest)
        rows, blocks = -(-rows // in_a_row), blocks * in_a_row
        tokens = datamodule.pack_length
    anchors = torch.zeros(1, blocks, device=device)
    attention = choose_attention(
        module.hparams.attention,
        anchors,
        tokens,
        drafter.config.block_size,
        drafter.config.head_dim,
    )
    strategy = trainer.strategy
    copies = 1
    if isinstance(strategy, DDPStrategy):
        copies += not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
    mixed = "mixed" in str(trainer.precision)
    estimate = estimate_step(
        drafter.config,
        StepSizes(
            rows=rows,
            tokens=tokens,
            anchors=anchors.shape[1],
            vocab_size=head.vocab_size,
            chunk_rows=head.chunk_rows(whole=whole),
            compute_bytes=2 if mixed else 4,
            feature_bytes=head.weight.element_size(),
            casts_features=head.weight.dtype != (torch.bfloat16 if mixed else torch.float32),
            attention=attention,
            device="cuda" if device.type == "cuda" else "cpu",
            logit_buffers=logit_buffers(head, whole=whole),
            gradient_copies=copies,
            soft_labels="kl" in module.loss.reads,
            whole_scores=len(module.loss.reads_whole),
            optimizer=module.hparams.optimizer,
        ),
    )
    if is_sharded(drafter):
        ranks = trainer.world_size
        return dataclasses.replace(
            estimate,
            gradients=estimate.gradients // ranks,
            optimizer=estimate.optimizer // ranks,
        )
    return estimate
