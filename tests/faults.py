"""Faults for runs in tests: signals at a step."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback


class KillAt(Callback):
    """Sends a signal to one rank's own process when the run is about to take a step.

    Args:
        step: Optimizer steps taken by then.
        sig: The signal's name.
        rank: Whose process.
    """

    def __init__(self, step: int, sig: str = "SIGTERM", rank: int = 0) -> None:
        self.step = step
        self.sig = sig
        self.rank = rank
        self.sent = False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), getattr(signal, self.sig))
