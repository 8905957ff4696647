"""SpeculativeVerification: accepted length by exact verification, before training and each epoch.

Legend: N drafted slots, K block size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.checkpoints import MONITOR
from callbacks.run_files import flatten
from data.prompt_sets import held_out_prompts, load_prompts
from drafter.errors import UserError
from drafter.evaluation.measure import DrafterMetrics, FeatureStore, MeasuredResponse, measure
from drafter.evaluation.trajectories import (
    EvalPrompt,
    Trajectory,
    TrajectorySettings,
    generate_trajectories,
    stored_trajectories,
    target_argmax_share,
)
from drafter.files import cache_root
from drafter.model import Drafter
from drafter.ranks import sum_over_ranks
from drafter.sampling import Sampling

ALL_SETS = ""


@dataclass
class Verified:
    """One verification's figures: over all sets (name "") and per set, the same on every rank."""

    figures: dict[str, dict[str, Any]]
    round_lengths: Tensor
    """(K + 1,) int64, how many rounds had each length."""
    sample: str
    seconds: float


class SpeculativeVerification(Callback):
    """Reports accepted length at each validation epoch's end, and once before training.

    Runs on every rank over its share of the prompts. Training is the same to the bit whether it is
    on or off. The trajectories are the run's own target's, at its own dtype, generated once before
    the first epoch and kept under a key of everything that determines them.

    Args:
        prompt_sets: Files of prompts by set name; the held-out rows are the set `held_out`.
        held_out: Also measure on the datamodule's held-out rows.
        prompts_per_set: Prompts of each set, from its start; 0 for all.
        max_new_tokens: Limit of a response in tokens.
        mode: `replay` reads the rounds off the trajectories; `decode` runs the real loop.
        temperature: 0 is greedy.
        top_k: Keep the k most probable tokens; 0 for all.
        top_p: Keep the most probable tokens up to this mass.
        seed: Of sampled trajectories.
        trust_responses: Use the responses stored with the prompts as trajectories; the share of
            their tokens that equals the target's argmax is logged.
        every_n_epochs: Epochs between verifications, at the end of their validation; the
            one at max_epochs or max_steps is verified too. 0 switches it off.
        before_training: Measure the drafter before the first step too.
        batch_size: Prompts generated together.
        anchors_per_chunk: Blocks denoised at once in replay; bounds memory.
        feature_budget_gb: Target features kept between epochs, in GB per rank.
        cache_dir: Where trajectories are kept; None for ~/.cache/l2r-drafter.
        progress: Show bars.
    """

    def __init__(
        self,
        prompt_sets: dict[str, str] | None = None,
        held_out: bool = True,
        prompts_per_set: int = 64,
        max_new_tokens: int = 128,
        mode: Literal["replay", "decode"] = "replay",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        trust_responses: bool = False,
        every_n_epochs: int = 1,
        before_training: bool = True,
        batch_size: int = 32,
        anchors_per_chunk: int = 128,
        feature_budget_gb: float = 4.0,
        cache_dir: str | None = None,
        progress: bool = True,
    ) -> None:
        self.prompt_sets = prompt_sets or {}
        self.held_out = held_out
        self.prompts_per_set = prompts_per_set
        self.mode = mode
        self.settings = TrajectorySettings(
            max_new_tokens, Sampling(temperature, top_k, top_p), seed
        )
        self.trust_responses = trust_responses
        self.every_n_epochs = every_n_epochs
        self.before_training = before_training
        self.batch_size = batch_size
        self.anchors_per_chunk = anchors_per_chunk
        self.progress = progress
        self.folder = cache_root(cache_dir) / "trajectories"
        self._features = FeatureStore(int(feature_budget_gb * 1e9))
        self._trajectories: list[Trajectory] | None = None
        self._argmax_share: float | None = None
        self.initial: Verified | None = None
        """Figures from before training; None on a resumed run."""

    # ------------------------------------------------------------------ hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates the trajectories; measures the untrained drafter unless the run is resumed."""
        if not self.every_n_epochs or trainer.fast_dev_run:
            return
        if getattr(trainer.datamodule, "val_row_set", None) is None:  # type: ignore[attr-defined]
            raise UserError(
                "Verification runs at the end of validation, but there are no held-out rows: set "
                "--data.val_rows or --data.val_data, or --verification.every_n_epochs 0."
            )
        self._load(trainer, pl_module)
        if not self.before_training or trainer.global_step > 0:
            return
        self.initial = self._verify(trainer, pl_module)
        scalars = _scalars(self.initial, self._argmax_share)
        if isinstance(trainer.logger, TensorBoardLogger):
            # once, flat and with a metric, or TensorBoard's HPARAMS tab stays empty
            start = {MONITOR: scalars.pop(MONITOR)}
            trainer.logger.log_hyperparams(flatten(dict(pl_module.hparams)), start)
        if trainer.logger is not None:
            trainer.logger.log_metrics(scalars, step=0)
        self._show(trainer, self.initial, "before training", step=0)

    def cache_settings(self) -> dict[str, Any]:
        """Returns which held-out responses a feature cache has to hold for this callback."""
        return {
            "prompts_per_set": self.prompts_per_set,
            "max_new_tokens": self.settings.max_new_tokens,
            "verify_batch_size": self.batch_size,
        }

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs, on every rank alike, so that a checkpoint can monitor the result."""
        if not self._due(trainer):
            return
        self._load(trainer, pl_module)
        verified = self._verify(trainer, pl_module)
        for name, value in _scalars(verified, self._argmax_share).items():
            shown = name == MONITOR
            name = name.replace("val/", "test/", 1) if trainer.testing else name
            self.log(name, value, prog_bar=shown)
        when = f"epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else "drafter"
        # where Lightning puts the scalars of this epoch
        self._show(trainer, verified, when, step=max(0, trainer.global_step - 1))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after a validation epoch, under test/."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _due(self, trainer: Trainer) -> bool:
        if not self.every_n_epochs or trainer.sanity_checking:
            return False
        fitting = trainer.state.fn == "fit"
        done = trainer.current_epoch + 1
        steps = trainer.max_steps or -1
        last = done == trainer.max_epochs or 0 < steps <= trainer.global_step
        return not fitting or done % self.every_n_epochs == 0 or last

    # ------------------------------------------------------------------ prompts and trajectories

    def _load(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trajectories is not None:
            return
        target = pl_module.target
        prompts = self._prompts(trainer, target)[trainer.global_rank :: trainer.world_size]

        def load() -> list[Trajectory]:
            if self.trust_responses:
                return stored_trajectories(prompts, self.settings.max_new_tokens)
            return generate_trajectories(
                target,
                prompts,
                self.settings,
                folder=self.folder,
                batch_size=self.batch_size,
                progress=self.progress and trainer.is_global_zero,
            )

        self._trajectories = _on_all_ranks(load, trainer)
        if self.trust_responses:
            stored = self._trajectories
            equal, total = _on_all_ranks(lambda: target_argmax_share(target, stored), trainer)
            sums = sum_over_ranks(
                torch.tensor([equal, total], dtype=torch.float64), _device(trainer)
            )
            self._argmax_share = float(sums[0] / sums[1].clamp(min=1))

    def _prompts(self, trainer: Trainer, target: Any) -> list[EvalPrompt]:
        limit = self.prompts_per_set or None
        prompts: list[EvalPrompt] = []
        rows = getattr(trainer.datamodule, "val_row_set", None)  # type: ignore[attr-defined]
        if self.held_out and rows is not None:
            prompts += held_out_prompts(rows, limit)
        for name, path in self.prompt_sets.items():
            loaded = load_prompts(path, target.tokenizer, vocab_size=target.vocab_size, limit=limit)
            prompts += [EvalPrompt(name, p.prompt_id, p.ids, p.response_ids) for p in loaded]
        room = target.max_length - self.settings.max_new_tokens
        kept = [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]
        if len(kept) < len(prompts) and trainer.is_global_zero:
            print(
                f"verification: {len(prompts) - len(kept)} of {len(prompts)} prompts are left out: "
                f"they are empty, or leave no room for {self.settings.max_new_tokens} new tokens "
                f"in the target's context of {target.max_length}"
            )
        if not kept:
            raise UserError(
                "Verification has no prompts: set --data.val_rows or --verification.prompt_sets, "
                "and leave them room in the target's context."
            )
        return kept

    # ------------------------------------------------------------------ measuring

    def _verify(self, trainer: Trainer, pl_module: LightningModule) -> Verified:
        begun = time.perf_counter()
        trained, target = pl_module.drafter, pl_module.target
        names = sorted({t.prompt.set_name for t in self._trajectories or []})
        names = _union_over_ranks(names, trainer)
        block_size = trained.config.block_size
        metrics = {name: DrafterMetrics(block_size - 1) for name in (ALL_SETS, *names)}
        lengths = torch.zeros(block_size + 1, dtype=torch.float64)

        def run(drafter: Drafter) -> list[MeasuredResponse]:
            done = []
            for response in measure(
                drafter,
                target,
                self._trajectories or [],
                self.settings,
                mode=self.mode,
                features=self._features,
                anchors_per_chunk=self.anchors_per_chunk,
                progress=self.progress and trainer.is_global_zero,
            ):
                done.append(response)
                metrics[ALL_SETS].update(response.counts)
                metrics[response.trajectory.prompt.set_name].update(response.counts)
                for length in response.drawn.round_lengths:
                    lengths[length] += 1
            return done

        was_training = trained.training
        # what verification draws must not move the training run's random numbers
        device = _device(trainer)
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards), trainer.precision_plugin.forward_context():
            drafter = pl_module.whole_drafter().eval()
            done = _on_all_ranks(lambda: run(drafter), trainer)
        trained.train(was_training)
        if trainer.world_size > 1:  # added up on the CPU, synced where the backend can
            metrics = {name: metric.to(device) for name, metric in metrics.items()}
        figures = {name: metric.compute() for name, metric in metrics.items()}
        return Verified(
            figures,
            sum_over_ranks(lengths, device).long(),
            marked_sample(_first(done), target.tokenizer) if done else "",
            time.perf_counter() - begun,
        )

    def _show(self, trainer: Trainer, verified: Verified, when: str, step: int) -> None:
        if not trainer.is_global_zero:
            return
        total = verified.figures[ALL_SETS]
        sets = ", ".join(
            f"{name} {figures['accepted_length']:.3f}"
            for name, figures in verified.figures.items()
            if name != ALL_SETS
        )
        print(
            f"[{when}] accepted length {total['accepted_length']:.3f} ({sets}), "
            f"waste {_or_zero(total['waste_ratio']):.2f}, {verified.seconds:.1f} s",
            flush=True,
        )
        writer = getattr(trainer.logger, "experiment", None)
        if writer is None or not hasattr(writer, "add_text"):
            return
        lengths = np.repeat(np.arange(len(verified.round_lengths)), verified.round_lengths.numpy())
        if len(lengths):
            writer.add_histogram("val/round_lengths", lengths, global_step=step)
        writer.add_text("val/sample", verified.sample, global_step=step)


def marked_sample(response: MeasuredResponse, tokenizer: Any) -> str:
    """Returns a decoded response as text, accepted runs in brackets, for TensorBoard."""
    ids, counts = response.ids, response.drawn
    parts, at = [tokenizer.decode(ids[:1])], 1
    for length, accepted in zip(counts.round_lengths, counts.round_accepted, strict=True):
        if accepted:
            parts.append(f"⟦{tokenizer.decode(ids[at : at + accepted])}⟧")
        parts.append(tokenizer.decode(ids[at + accepted : at + length]))
        at += length
    text = tokenizer.decode(response.trajectory.prompt.ids) + "".join(parts)
    indented = text.replace("\n", "\n    ")  # an indented block shows any text as it is
    return f"Accepted runs stand in ⟦brackets⟧.\n\n    {indented}"


def _place(response: MeasuredResponse) -> tuple[str, int]:
    return response.trajectory.prompt.set_name, response.trajectory.prompt.prompt_id


def _first(done: list[MeasuredResponse]) -> MeasuredResponse:
    return min(done, key=_place)


def _scalars(verified: Verified, argmax_share: float | None) -> dict[str, float]:
    total = verified.figures[ALL_SETS]
    out = {
        "val/accepted_length": total["accepted_length"],
        "val/accepted_length_unclipped": total["accepted_length_unclipped"],
        "val/accepted_length_per_response": total["accepted_length_per_response"],
        "val/accepted_per_round": total["accepted_per_round"],
        # no right draft at all wastes none
        "val/waste_ratio": _or_zero(total["waste_ratio"]),
        "val/verification_seconds": verified.seconds,
    }
    if math.isfinite(total["waste_ratio_all_anchors"]):  # the real loop doesn't know it
        out["val/waste_ratio_all_anchors"] = total["waste_ratio_all_anchors"]
    for name, figures in verified.figures.items():
        if name != ALL_SETS:
            out[f"val/accepted_length/{name}"] = figures["accepted_length"]
    for k, rate in enumerate(total["accept_rate"], start=1):
        out[f"val/accept_rate_pos_{k}"] = _or_zero(rate)  # 0: never reached
    if argmax_share is not None:
        out["val/responses_equal_target_argmax"] = argmax_share
    return out


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _on_all_ranks(function: Callable[[], Any], trainer: Trainer) -> Any:
    """Runs a function on every rank; if it fails on one, all raise instead of waiting for it."""
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failed = sum_over_ranks(torch.tensor([float(error is not None)]), _device(trainer))
    if error is not None:
        raise error
    if failed > 0:
        raise RuntimeError(f"verification failed on {int(failed)} other rank(s); see their output")
    return result


def _device(trainer: Trainer) -> torch.device:
    device: torch.device = trainer.strategy.root_device
    return device


def _union_over_ranks(names: list[str], trainer: Trainer) -> list[str]:
    if trainer.world_size == 1:
        return names
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, names)
    return sorted({name for part in gathered for name in part})
