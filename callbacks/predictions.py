"""Writes what `train.py predict` decodes, one JSON line a prompt, as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes text, round lengths and tokens per second of every prompt.

    Args:
        output: JSONL file; with several ranks each writes <stem>.rank<r>.jsonl.
    """

    def __init__(self, output: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)
        self._path = self.output
        self._tokens = self._rounds = self._emitted = 0
        self._seconds = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a new file."""
        if trainer.world_size > 1:
            name = f"{self.output.stem}.rank{trainer.global_rank}{self.output.suffix}"
            self._path = self.output.with_name(name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Appends one prediction."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        self._tokens += len(prediction["response_ids"])
        self._rounds += len(prediction["round_lengths"])
        self._emitted += sum(prediction["round_lengths"])
        self._seconds += prediction["seconds"]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the file and its totals."""
        print(
            f"{self._path}: {self._tokens} tokens, accepted length "
            f"{self._emitted / max(1, self._rounds):.3f}, "
            f"{self._tokens / max(1e-9, self._seconds):.1f} tokens/s",
            flush=True,
        )
