"""Preemption: on SIGTERM a run saves after the step that it is in, and leaves.

`train.py` then exits with code 143.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoints import LastCheckpoint
from drafter.ranks import sum_over_ranks

EXIT_CODE = 128 + signal.SIGTERM
"""143: what a shell reports of a process that SIGTERM ended. Schedulers and torchrun restart it."""


@contextlib.contextmanager
def preempted_exit() -> Iterator[None]:
    """Gives a preempted run's process the exit code that a scheduler can act on."""
    try:
        yield
    except SIGTERMException:
        raise SystemExit(EXIT_CODE) from None


class Preemption(Callback):
    """Saves and exits when the scheduler asks for it.

    Lightning's own handler talks to the other ranks from inside the signal; here the signal only
    leaves a note, and the ranks agree at a step's end, so that all of them write one checkpoint.

    Args:
        check_every_n_steps: With several ranks, optimizer steps between looking for each other's
            notes (each look waits for the device). A single process looks after every step.
    """

    def __init__(self, check_every_n_steps: int = 10) -> None:
        self.check_every_n_steps = max(1, check_every_n_steps)
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes SIGTERM over from Lightning; only a process's main thread may."""
        self._asked = False
        # with several ranks Lightning asks the others before every step, and waits for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            self._before = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves and leaves if any rank was asked to; never inside an accumulation window."""
        accumulate = trainer.accumulate_grad_batches
        done = batch_idx + 1
        if done % accumulate and done != trainer.num_training_batches:
            return
        if trainer.world_size > 1 and trainer.global_step % self.check_every_n_steps:
            return
        asked = torch.tensor(float(self._asked))
        if not sum_over_ranks(asked, trainer.strategy.root_device):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save_now(trainer)
                if trainer.is_global_zero:
                    print(
                        f"\n[preempted] saved {callback.path} at step {trainer.global_step}; "
                        "--ckpt_path last goes on from there",
                        flush=True,
                    )
        # Lightning logs this step first, then leaves
        trainer._signal_connector.received_sigterm = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does not begin what a scheduler will not wait for: the epoch's last step is saved."""
        if trainer.received_sigterm and not trainer.sanity_checking:
            raise SIGTERMException

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _nothing() -> None:
    """In the place of what this callback does itself."""
