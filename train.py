"""Trains, validates and runs drafters: `python train.py fit|validate|test|predict --config ...`."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from callbacks.memory import MemoryReport
from callbacks.predictions import PredictionWriter
from callbacks.preemption import Preemption, preempted_exit
from callbacks.resume import Resume
from callbacks.run_files import Provenance, RunSummary, SaveRunConfig
from callbacks.verification import SpeculativeVerification
from data.online import OnlineHiddenStates
from drafter.errors import UserError, one_sentence_errors
from drafter.module import DrafterModule

RUN_DIR_VARIABLE = "L2R_RUN_DIR"
"""Tells the processes that Lightning launches which folder the first one chose."""


class DrafterCLI(LightningCLI):
    """LightningCLI with a run folder, our callbacks, and settings that win over a checkpoint's."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--run_dir` and a group of flags for each callback."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/drafter",
            help="Folder of the run: configs, provenance, checkpoints, TensorBoard events.",
        )
        parser.add_lightning_class_args(SpeculativeVerification, "verification")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint_best")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint_last")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(Resume, "resume")
        parser.add_lightning_class_args(MemoryReport, "memory")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.link_arguments("model.block_size", "data.block_size")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_int_seed)
        parser.link_arguments("run_dir", "checkpoint_best.dirpath", compute_fn=_checkpoint_dir)
        parser.link_arguments("run_dir", "checkpoint_last.dirpath", compute_fn=_checkpoint_dir)

    def _parse_ckpt_path(self) -> None:
        """Resolves `last`; never lets a checkpoint's hyper-parameters win (lightning-traps 1)."""
        config = self.config.get(self.config.get("subcommand") or "")
        if config is None or not config.get("ckpt_path"):
            if config is not None and self.config.subcommand != "fit":
                self._check_starting_drafter(config)
            return
        if config.ckpt_path == "last":
            self._continuing = True
            last = Path(_checkpoint_dir(config.run_dir)) / "last.ckpt"
            if self.config.subcommand == "fit" and not last.is_file():
                # a job that was preempted before its first checkpoint starts its own run again
                warnings.warn(f"--ckpt_path last: no {last} yet, starting anew.", stacklevel=2)
                config.ckpt_path = None
                return
            config.ckpt_path = str(last)
        if not Path(config.ckpt_path).is_file():
            raise UserError(f"--ckpt_path {config.ckpt_path}: there is no such file.")
        checkpoint = read_checkpoint(config.ckpt_path)
        self._resumed_step = int(checkpoint["global_step"])
        saved = checkpoint.get("hyper_parameters", {})
        for line in _differences(saved, config.model.as_dict()):
            print(f"[resume] {line}", flush=True)

    def _check_starting_drafter(self, config: Any) -> None:
        """Raises UserError unless a command without a checkpoint has `init_from`, and means it."""
        if not config.model.init_from:
            raise UserError(
                f"{self.config.subcommand} needs a trained drafter: pass --ckpt_path FILE or "
                "--ckpt_path last, or --model.init_from with a drafter's folder."
            )
        if (Path(_checkpoint_dir(config.run_dir)) / "last.ckpt").is_file():
            raise UserError(
                f"{config.run_dir} has a drafter of its own, which --model.init_from is not: "
                "pass --ckpt_path last for it, or another --run_dir."
            )

    def instantiate_classes(self) -> None:
        """Instantiates all; a setting that a class refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error, UserError) or not _raised_in(error, "losses"):
                raise
            raise UserError(str(error).strip()) from error
        self.model.continues = self._get(self.config, "ckpt_path")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Gives the trainer its logger, and callbacks that open and close the run's folder."""
        run_dir = self._get(self.config_init, "run_dir")
        if self._get(self.config_init, "trainer.logger") is None:
            fitting = self.subcommand == "fit"  # the other commands print what they find
            kwargs["logger"] = fitting and TensorBoardLogger(
                save_dir=str(Path(run_dir).parent),
                name=Path(run_dir).name,
                version="",
                default_hp_metric=False,
                purge_step=getattr(self, "_resumed_step", None),
            )
        plugins = self._given("trainer.plugins")
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        # looked up before: the trainer adds its own to the same list
        own_bar = any(isinstance(each, ProgressBar) for each in self._given("trainer.callbacks"))
        trainer = super().instantiate_trainer(**kwargs)
        if not own_bar:
            # Lightning's default draws a hundred times a second in the process that trains
            trainer.callbacks = [
                RichProgressBar(refresh_rate=4) if isinstance(callback, ProgressBar) else callback
                for callback in trainer.callbacks
            ]
        if self.subcommand == "fit":
            trainer.callbacks = [Provenance(run_dir), *trainer.callbacks, RunSummary(run_dir)]
        return trainer

    def _given(self, name: str) -> list[Any]:
        """Returns what the config lists under a name that also takes a single entry."""
        value = self._get(self.config_init, name) or []
        return value if isinstance(value, list) else [value]

    def before_instantiate_classes(self) -> None:
        """Moves to a free folder if the run folder holds another run."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            resuming = bool(config.ckpt_path) or getattr(self, "_continuing", False)
            chosen = choose_run_dir(config.run_dir, resuming)
            if chosen != config.run_dir:
                print(f"{config.run_dir} holds a run already; this one goes to {chosen}")
                config.run_dir = chosen
                config.checkpoint_best.dirpath = _checkpoint_dir(chosen)
                config.checkpoint_last.dirpath = _checkpoint_dir(chosen)


def choose_run_dir(run_dir: str, resuming: bool) -> str:
    """Returns `run_dir`, or `run_dir-2`, -3, ... if a run is there that is not being resumed.

    Raises:
        UserError: Under torchrun, where ranks can't agree on a new name before they are connected.
    """
    if os.environ.get(RUN_DIR_VARIABLE):
        return os.environ[RUN_DIR_VARIABLE]
    chosen, n = run_dir, 1
    if not resuming:
        while (Path(chosen) / "config.yaml").exists():
            n += 1
            chosen = f"{run_dir}-{n}"
    if chosen != run_dir and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            f"{run_dir} holds a run already: continue it with --ckpt_path last, or pass another "
            "--run_dir."
        )
    os.environ[RUN_DIR_VARIABLE] = chosen
    return chosen


def read_checkpoint(path: str) -> dict[str, Any]:
    """Returns a checkpoint's contents, read with weights_only and mapped, not copied.

    Raises:
        UserError: The file is not a checkpoint.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} can't be read as a checkpoint: {reason}") from error
    return checkpoint


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(saved.keys() & now.keys()):
        old, new = saved[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new and list_or_same(old) != list_or_same(new):
            lines.append(
                f"model.{prefix}{key}: checkpoint {old}, this run {new} (this run's holds)"
            )
    return lines


def list_or_same(value: Any) -> Any:
    """Returns tuples as lists, so that both spellings compare equal."""
    return list(value) if isinstance(value, tuple) else value


def _raised_in(error: BaseException, package: str) -> bool:
    """Returns whether the frame that raised is a file of this package of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parent == Path(__file__).parent / package for frame in frames)


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """Says which settings to lower when the device's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}). Lower --data.batch_size (with "
            "--trainer.accumulate_grad_batches to keep the step's size), --data.num_anchors or "
            "--data.max_length; --data.keep_in_memory false, or --data.cache, frees what features "
            "take, and --model.cuda_graphs false what recorded steps do. `--ckpt_path last` goes "
            "on from the last checkpoint."
        ) from error


def _checkpoint_dir(run_dir: str) -> str:
    return str(Path(run_dir) / "checkpoints")


def _int_seed(seed: Any) -> int:
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0


def main(args: list[str] | None = None) -> DrafterCLI:
    """Parses, builds and runs; prints a user's mistake as one sentence and exits with code 2.

    A run that SIGTERM ended exits with code 143, its checkpoint saved.
    """
    with one_sentence_errors():
        return run(args)


def run(args: list[str] | None = None) -> DrafterCLI:
    """Does what `main` does, but leaves a user's mistake to the caller.

    Raises:
        UserError: A user's mistake, or too little memory.
        SystemExit: Arguments that don't parse (code 2), or SIGTERM (code 143).
    """
    # what we log is the same on every rank already
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    with memory_advice(), preempted_exit():
        return DrafterCLI(
            DrafterModule,
            OnlineHiddenStates,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the module makes its own
            trainer_defaults={
                "use_distributed_sampler": False,  # the order is ours (lightning-traps 2)
                "num_sanity_val_steps": 0,
            },
            args=args,
        )


if __name__ == "__main__":
    main()
