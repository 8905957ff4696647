"""Faults for runs in tests: signals at a step."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback


class KillAt(Callback):
    """Sends a signal to one rank's own process when the run is about to take a step, or validate.

    Args:
        step: Optimizer steps taken by then.
        sig: The signal's name.
        rank: Whose process.
        validating: In the validation after that many steps.
    """

    def __init__(
        self, step: int, sig: str = "SIGTERM", rank: int = 0, validating: bool = False
    ) -> None:
        self.step = step
        self.sig = sig
        self.rank = rank
        self.validating = validating
        self.sent = False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not self.validating:
            self._kill_if_due(trainer)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.validating:
            self._kill_if_due(trainer)

    def _kill_if_due(self, trainer: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), getattr(signal, self.sig))


def kill_at(
    step: int, sig: str = "SIGTERM", rank: int = 0, validating: bool = False
) -> tuple[str, ...]:
    """Returns arguments of `train.py` that put a `KillAt` into a run."""
    return (
        "--trainer.callbacks+=tests.faults.KillAt",
        f"--trainer.callbacks.init_args.step={step}",
        f"--trainer.callbacks.init_args.sig={sig}",
        f"--trainer.callbacks.init_args.rank={rank}",
        f"--trainer.callbacks.init_args.validating={str(validating).lower()}",
    )
