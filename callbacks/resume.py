"""What Lightning leaves undone on resume: an epoch's validation, and other sizes."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from data.sampler import SIZES
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
        assert now.keys() == set(SIZES)
        changed = [f"{key} {state[key]} -> {now[key]}" for key in SIZES if state[key] != now[key]]
        if not changed:
            return
        if self.other_sizes == "refuse":
            was = " ".join(f"{key}={state[key]}" for key in SIZES)
            raise UserError(
                f"The checkpoint was written with {was}; this run changes {', '.join(changed)}, so "
                "the rest of its epoch would come in another order. Resume with those, or pass "
                "--resume.other_sizes next_epoch to leave out the rest of the epoch, or start a "
                "new run."
            )
        batches = datamodule.batches_per_epoch()
        epoch = int(state["epoch"])
        as_if_the_epoch_had_ended(loop, batches)
        self._left_out = True
        loop["state_dict"]["combined_loader"] = [{**state, **now, "handed": batches}]
        pl_module.schedule_origin = (int(checkpoint["global_step"]), epoch + 1)  # type: ignore[assignment]
        rank_zero_info(
            f"[resume] {', '.join(changed)}: goes on at epoch {epoch + 1}, step "
            f"{checkpoint['global_step']}; what was left of epoch {epoch} is left out"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates now what the stopped run had trained and not validated."""
        loop = trainer.fit_loop
        done = loop.epoch_progress.current
        if not (loop.restarted_mid_epoch and done.processed == done.ready):
            return
        # Lightning has counted the epoch as done, and would not count the next one as begun: a
        # second stop in that one would then go unnoticed, and its rows come again
        loop.reset_restart_stage()
        if self._left_out:
            return
        done.processed, done.completed = done.processed - 1, done.completed - 1
        if loop.epoch_loop._should_check_val_epoch():
            validate = loop.epoch_loop.val_loop
            validate.restarting = False
            validate.batch_progress.total.reset()
            trainer.validating = True
            validate.run()
            trainer.training = True
        done.processed, done.completed = done.processed + 1, done.completed + 1


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
