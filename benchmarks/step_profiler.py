"""Times a run's steps without changing them: waits for the device at two steps and at epoch ends.

python train.py fit ... --trainer.profiler benchmarks.step_profiler.StepProfiler \\
    --trainer.profiler.output steps.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from lightning.pytorch.profilers import Profiler

from drafter.files import write_atomic

STEP, EPOCH = "run_training_batch", "run_training_epoch"
WAIT = "[_TrainingEpochLoop].train_dataloader_next"


class StepProfiler(Profiler):
    """Writes seconds a step, the share of them that the loop waited for data, and epochs' seconds.

    Args:
        output: JSON file; rank 0 writes it.
        warmup: Steps before the clock starts.
        steps: Steps that are timed.
    """

    def __init__(self, output: str, warmup: int = 40, steps: int = 100) -> None:
        super().__init__()
        self.output = Path(output)
        self.warmup = warmup
        self.steps = steps
        self._step = 0
        self._wait = 0.0
        self._begun: dict[str, float] = {}
        self._result: dict[str, object] = {"epoch_seconds": []}

    def start(self, action_name: str) -> None:
        """Notes the time of what is measured."""
        if action_name == EPOCH:
            self._synchronise()
        if action_name in (EPOCH, WAIT):
            self._begun[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Adds up; writes when something is complete."""
        if action_name == WAIT and self._step >= self.warmup:
            self._wait += time.perf_counter() - self._begun[WAIT]
        elif action_name == STEP:
            self._step += 1
            if self._step == self.warmup:
                self._synchronise()
                self._begun[STEP], self._wait = time.perf_counter(), 0.0
            elif self._step == self.warmup + self.steps:
                self._synchronise()
                seconds = time.perf_counter() - self._begun[STEP]
                self._write(
                    seconds_per_step=seconds / self.steps,
                    data_wait=self._wait / seconds,
                    steps=self.steps,
                )
        elif action_name == EPOCH:
            self._synchronise()
            epochs = [*self._result["epoch_seconds"], time.perf_counter() - self._begun[EPOCH]]  # type: ignore[misc]
            self._write(epoch_seconds=epochs)

    def _write(self, **what: object) -> None:
        self._result |= what
        if self.local_rank == 0:
            write_atomic(self.output, json.dumps(self._result))

    def _synchronise(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
