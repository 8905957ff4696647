"""What Lightning leaves undone on resume: an epoch's validation, and other sizes."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drafter.errors import UserError


class Resume(Callback):
    """Brings a resumed run to where it was stopped.

    A checkpoint of an epoch's last step lacks the epoch's validation, if the run was stopped in it:
    it is made up for. And where world size, batch size or accumulation differ from the
    checkpoint's, the rows of the rest of its epoch would come in another order: the run is refused,
    or goes on at the next epoch. Optimizer and step count are then the checkpoint's, and a schedule
    over epochs takes what is left of them at the new sizes.

    Args:
        other_sizes: `refuse`, or `next_epoch` to leave out the rest of the checkpoint's epoch.
    """

    def __init__(self, other_sizes: Literal["refuse", "next_epoch"] = "refuse") -> None:
        self.other_sizes = other_sizes
        self._left_out = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks at the sizes that the checkpoint was written with.

        Raises:
            UserError: They differ, and the user has not said to go on.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        states = loop.get("state_dict", {}).get("combined_loader")
        if trainer.state.fn != "fit" or not states:
            return
        state, datamodule = states[0], trainer.datamodule  # type: ignore[attr-defined]
        now = {
            "world_size": trainer.world_size,
            "batch_size": datamodule.batch_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        changed = [f"{key} {state[key]} -> {now[key]}" for key in now if state[key] != now[key]]
        if not changed:
            return
        if self.other_sizes == "refuse":
            was = " ".join(f"{key}={state[key]}" for key in now)
            raise UserError(
                f"The checkpoint was written with {was}; this run changes {', '.join(changed)}, so "
                "the rest of its epoch would come in another order. Resume with those, or pass "
                "--resume.other_sizes next_epoch to leave out the rest of the epoch, or start a "
                "new run."
            )
        batches = datamodule.batches_per_epoch()
        epoch = int(state["epoch"])
        self._left_out = not loop["epoch_loop.batch_progress"]["is_last_batch"]
        as_if_the_epoch_had_ended(loop, batches)
        loop["state_dict"]["combined_loader"] = [{**state, **now, "handed": batches}]
        pl_module.schedule_origin = (int(checkpoint["global_step"]), epoch + 1)  # type: ignore[assignment]
        rest = f"; what was left of epoch {epoch} is left out" if self._left_out else ""
        rank_zero_info(
            f"[resume] {', '.join(changed)}: goes on at epoch {epoch + 1}, step "
            f"{checkpoint['global_step']}{rest}"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates now what the stopped run had trained and not validated."""
        loop = trainer.fit_loop
        progress, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
        if not (loop.restarted_mid_epoch and progress.current.processed == progress.current.ready):
            return
        # Lightning has counted the epoch as done, and would not count the next one as begun: a
        # second stop in that one would then go unnoticed, and its rows come again
        loop.reset_restart_stage()
        if self._left_out:
            return
        pending = batches.total.processed - batches.total.completed

        def shift(epochs: int) -> None:
            """Moves the counts to where they stand in an epoch's validation, and back."""
            for one in (progress.current, progress.total):
                one.processed, one.completed = one.processed + epochs, one.completed + epochs
            for batch in (batches.current, batches.total):
                batch.completed -= epochs * pending

        shift(-1)
        validate(trainer)
        shift(1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run whose last step was taken: its loop is not entered again."""
        loop = trainer.fit_loop
        progress, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        pending = batches.total.processed - batches.total.completed  # none after a validation
        if not (loop.restarting and batches.is_last_batch and pending):
            return
        if progress.processed < progress.ready:
            for batch in (batches.current, batches.total):
                batch.completed += pending
            validate(trainer)


def validate(trainer: Trainer) -> None:
    """Runs the validation of the current epoch, if it is one that has any."""
    loop = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_epoch():
        return
    loop.val_loop.restarting = False
    loop.val_loop.batch_progress.total.reset()
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True


def as_if_the_epoch_had_ended(loop: dict[str, Any], batches: int) -> None:
    """Changes a fit loop's state to that of a checkpoint saved at the epoch's last batch.

    Args:
        loop: `checkpoint["loops"]["fit_loop"]`.
        batches: Of an epoch of the run that goes on.
    """
    progress = loop["epoch_loop.batch_progress"]
    # a checkpoint written at a batch's end has not counted it as completed yet
    pending = progress["total"]["processed"] - progress["total"]["completed"]
    progress["current"] = dict.fromkeys(("ready", "started", "processed"), batches)
    progress["current"]["completed"] = batches - pending
    progress["is_last_batch"] = True
