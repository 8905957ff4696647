"""What a run leaves beside its checkpoints: configs, provenance and a closing summary."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoints import MONITOR, BestCheckpoint, LastCheckpoint
from drafter.files import free_path, pieces, write_atomic

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "tensorboard")


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config to <run_dir>/config.yaml, and on resume to config.resume-<n>.yaml.

    Lightning's own callback raises when config.yaml exists (lightning-traps 3).
    """

    already_saved: bool

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes once, on rank 0, at the start of a fit."""
        if self.already_saved or stage != "fit" or not trainer.is_global_zero:
            return
        run_dir = getattr(self.config, "run_dir", None)
        if run_dir is None or trainer.fast_dev_run:
            return
        path = free_path(Path(run_dir), "config", ".yaml")
        write_atomic(path, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


class Provenance(Callback):
    """Writes <run_dir>/provenance.json: argv, git commit, versions, world size, target, time.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file, under a new name on resume; a checkpoint's step is known only here."""
        if trainer.fast_dev_run:
            return
        target = getattr(getattr(trainer, "datamodule", None), "target", None)
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "argv": sys.argv,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "device": _device_name(trainer),
            "target": getattr(target, "path", None),
            "target_fingerprint": getattr(target, "fingerprint", None),
            "resumed_from": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "resumed_at_step": trainer.global_step,
        }
        path = free_path(self.run_dir, "provenance", ".json")
        write_atomic(path, json.dumps(record, indent=2) + "\n")


class RunSummary(Callback):
    """Prints where everything is when the fit ends, and how to go on.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints run folder, checkpoints, the TensorBoard line and the command to continue."""
        if trainer.fast_dev_run:
            return
        best = next(
            (c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None
        )
        last = next(
            (c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None
        )
        length = trainer.callback_metrics.get(MONITOR)
        print()
        if length is not None:
            print(
                f"accepted length   {float(length):.3f} tokens per target pass (1.0 = no drafter)"
            )
        print(f"run folder        {self.run_dir}")
        if best is not None and best.best_model_path:
            print(f"best checkpoint   {_relative(best.best_model_path)}")
        if last is not None and last.path.exists():
            print(f"last checkpoint   {_relative(last.path)}")
        print(f"watch             {_python_tool('tensorboard')} --logdir {self.run_dir}")
        if trainer.max_steps > 0:
            further = f"--trainer.max_steps {2 * trainer.max_steps}"
        else:
            epochs = trainer.max_epochs or trainer.current_epoch
            further = f"--trainer.max_epochs {max(trainer.current_epoch + 1, 2 * epochs)}"
        newest = pieces(self.run_dir, "config", ".yaml")[-1]
        config = shlex.quote(_relative(newest))
        print(
            f"continue          {_relative(sys.executable)} train.py fit --config {config} "
            f"--ckpt_path last {further}",
            flush=True,
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as dotted keys with plain values.

    Example:
        >>> flatten({"loss": {"gamma": 10.0}, "betas": [0.9, 0.95]})
        {'loss.gamma': 10.0, 'betas': '[0.9, 0.95]'}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            out[f"{prefix}{key}"] = value if plain else str(value)
    return out


def _python_tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return _relative(beside) if beside.exists() else name


def _relative(path: Any) -> str:
    relative = os.path.relpath(str(path))
    return str(path) if relative.startswith("..") else relative


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Returns the hash of the commit that is checked out; None outside a repository."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
