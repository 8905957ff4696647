"""The training bar: Lightning's, without its price."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class TrainingBar(RichProgressBar):
    """`RichProgressBar` that looks at metrics only when there are new ones.

    Lightning's copies them to the host after every step, and so waits for the device, which then
    waits for the host to prepare the next step; and it draws itself a hundred times a second in
    the process that does so.

    Args:
        refresh_rate: Drawings a second.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._shown: dict[str, Any] | None = None

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns what the bar shows: after a logged step anew, else what it showed before."""
        old = trainer.training and trainer.global_step % max(1, trainer.log_every_n_steps) != 0
        if self._shown is None or not old:
            self._shown = super().get_metrics(trainer, pl_module)
        return self._shown
