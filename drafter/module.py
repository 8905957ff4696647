"""DrafterModule: the LightningModule that trains a drafter with the combined loss.

Legend: B rows, S tokens per row, A anchors per row, K block size, N drafted slots, D hidden size,
L tapped layers, M = B*A blocks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from drafter.attention import AttentionKind, build_visibilities
from drafter.blocks import DraftBatch, LastHidden, build_blocks
from drafter.config import DrafterConfig, check_block_size
from drafter.draft_vocabulary import ReducedHead, check_draft_vocab_size, most_frequent
from drafter.errors import UserError
from drafter.evaluation.loading import check_fits, load_drafter
from drafter.evaluation.prediction import Decoding, predict_prompt
from drafter.evaluation.trajectories import EvalPrompt
from drafter.graphs import StepGraphs
from drafter.guard import NonFiniteGuard, OnNonFinite
from drafter.head import FrozenHead, score_blocks
from drafter.initialise import InitFromTarget, initialise_from_target
from drafter.mask_token import choose_mask_token
from drafter.model import Drafter
from drafter.optimisation import (
    OptimiserSettings,
    OptimizerKind,
    apply_settings,
    clip,
    make_optimizer,
    number_as_module,
)
from drafter.ranks import sum_over_ranks
from drafter.recompute import INDUCTOR_OPTIONS
from drafter.sharding import is_sharded, shard, whole
from drafter.soft_labels import SoftLabels, check_linear, soft_labels
from drafter.target import Target, check_layer_ids, default_layer_ids
from drafter.training_log import WindowLog
from drafter.whole_scores import TargetStates
from losses.combined import CombinedLoss, LossOutput
from losses.scores import BlockScores

CHECKPOINT_KEY = "drafter_config"


ConfidenceGradient = Literal["none", "attached", "detached"]

DEFAULT_LOSS = CombinedLoss()
DEFAULT_DECODING = Decoding()


class DrafterModule(LightningModule):
    """Trains a block-diffusion drafter; one drafter forward a step, whatever losses are on.

    The target belongs to the datamodule. Its embedding and head are borrowed as plain objects, so
    checkpoints hold drafter weights only.

    Args:
        loss: The combined loss; overlays in configs/losses.
        block_size: K, tokens per block with the anchor slot.
        num_layers: Drafter layers.
        target_layer_ids: Tapped target layers (0-based; id i is the output of layer i), None for
            `num_taps` evenly spread ones.
        num_taps: Number of default taps, L.
        mask_token_id: Input at drafted slots; None chooses one the tokenizer reserves.
        intermediate_size: Width of the drafter's MLP; None for the target's.
        draft_vocab_size: Draft from this many tokens only, those that are supervised most often in
            the training rows (equal counts: lowest id), counted once before the first step and kept
            in checkpoints. The head's products shrink by what is left out. A label outside is
            wrong, never skipped (README, "A smaller draft vocabulary"). None drafts from all.
        confidence_head: Give the drafter a head that says how likely each slot is to be accepted,
            which decides draft lengths (`evaluate.py calibrate`); a `losses.Confidence` among
            loss.extra trains it. Its gradient reaches the drafter too (`attached`, as in DSpark),
            or the head alone (`detached`: the drafter trains as without one, but for the clip of
            the gradient's norm, which counts both).
        init_from_target: Start the final norm (`norm`) or whole layers (`layers`) from the target.
        init_from: Start from a drafter's weights: a checkpoint, a run folder or a drafter's folder.
            Layers, widths, taps and mask token are that drafter's; steps, schedule and optimizer
            begin anew (`--ckpt_path` continues a run instead).
        optimizer: `adamw`, or `muon`: orthogonal steps for matrices (`drafter.muon`).
        learning_rate: Peak learning rate. Muon's steps have AdamW's size, but bear about ten times
            the rate.
        weight_decay: On matrices; norms have none.
        betas: AdamW's moment decays.
        momentum: Muon's.
        warmup_fraction: Share of the steps with linear warm-up.
        final_lr_fraction: Learning rate at the end of the cosine, as a share of the peak.
        total_steps: Optimizer steps of the schedules; None takes trainer.max_steps, or
            trainer.max_epochs times the steps of an epoch.
        max_grad_norm: Clip of the gradient's norm; 0 for none.
        on_nonfinite: A gradient that is not finite changes no weight; `stop` then ends the run with
            the batch saved, `skip` goes on and counts.
        attention: `sdpa`, `flex` (CUDA), or `auto` by work size.
        compile_drafter: torch.compile the drafter in place, and the scoring of its states.
        cuda_graphs: Launch the drafter's and the head's part of a step as one, recorded for each
            shape of batch (set data.pad_multiple, so that there are few). For small drafters, whose
            kernels take longer to launch than to run; graphs take two to four steps' memory.
            Without a GPU, and where the run says so, it changes nothing.
        log_gradient_norms_every: Log each term's gradient norm every so many steps, at the next
            step that is logged (trainer.log_every_n_steps); 0 for never. It costs a backward pass
            per term at those steps, and no forward.
        decoding: How `predict` decodes; not part of the drafter.
    """

    def __init__(
        self,
        loss: CombinedLoss = DEFAULT_LOSS,
        block_size: int = 16,
        num_layers: int = 4,
        target_layer_ids: list[int] | None = None,
        num_taps: int = 5,
        mask_token_id: int | None = None,
        intermediate_size: int | None = None,
        draft_vocab_size: int | None = None,
        confidence_head: ConfidenceGradient = "none",
        init_from_target: InitFromTarget = "norm",
        init_from: str | None = None,
        optimizer: OptimizerKind = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        warmup_fraction: float = 0.015,
        final_lr_fraction: float = 0.0,
        total_steps: int | None = None,
        max_grad_norm: float = 1.0,
        on_nonfinite: OnNonFinite = "stop",
        attention: AttentionKind = "auto",
        compile_drafter: bool = False,
        cuda_graphs: bool = False,
        log_gradient_norms_every: int = 0,
        decoding: Decoding = DEFAULT_DECODING,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        # a checkpoint's hyper-parameters are plain values (weights_only), so loss may be a dict
        self.loss = CombinedLoss.from_saved(loss) if isinstance(loss, dict) else loss
        self.save_hyperparameters(
            {
                # extra terms are objects: a loaded module has those that have names
                "loss": {**dataclasses.asdict(self.loss), "extra": None},
                "block_size": block_size,
                "num_layers": num_layers,
                "target_layer_ids": target_layer_ids,
                "num_taps": num_taps,
                "mask_token_id": mask_token_id,
                "intermediate_size": intermediate_size,
                "init_from_target": init_from_target,
                "init_from": init_from,
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "momentum": momentum,
                "warmup_fraction": warmup_fraction,
                "final_lr_fraction": final_lr_fraction,
                "total_steps": total_steps,
                "max_grad_norm": max_grad_norm,
                "on_nonfinite": on_nonfinite,
                "attention": attention,
                "compile_drafter": compile_drafter,
                "cuda_graphs": cuda_graphs,
                "log_gradient_norms_every": log_gradient_norms_every,
                # checkpoints of drafters without them stay what they were
                **({} if draft_vocab_size is None else {"draft_vocab_size": draft_vocab_size}),
                **({"confidence_head": confidence_head} if confidence_head != "none" else {}),
            },
            logger=False,
        )
        self.schedule_origin = (0, 0)
        """(step, epoch) since which epochs have had this run's number of steps."""
        self.continues: str | None = None
        """A checkpoint about to be loaded: it has what `init_from` gave, which may be gone."""
        self.decoding = decoding
        self.draft_vocab_size = draft_vocab_size
        self.confidence_head = confidence_head
        self.drafter: Drafter | None = None
        self._target: Target | None = None
        self._predicting: tuple[Drafter] | None = None
        self._batch: DraftBatch | None = None
        self._graphs: StepGraphs | None = None
        self._guard = NonFiniteGuard(on_nonfinite)
        self._log = WindowLog()
        self._val_log = WindowLog()
        self._for_bar: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ construction

    def setup(self, stage: str) -> None:
        """Takes the target from the datamodule and makes the drafter, unless a checkpoint has.

        Chooses what a drafter with a reduced vocabulary drafts from, unless it is known.
        """
        device = self.trainer.strategy.root_device
        if self.hparams.attention == "flex" and device.type != "cuda":
            raise UserError(
                f"attention: flex trains on CUDA only, and this run is on {device.type}; use "
                "attention: auto or sdpa."
            )
        if stage == "fit" and self.trainer.precision == "16-mixed":
            raise UserError(
                "trainer.precision 16-mixed scales gradients, which clipping and on_nonfinite do "
                "not know of; use bf16-mixed, or 32-true."
            )
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.attach(datamodule.target)
        assert self.drafter is not None
        if stage == "fit" and self.continues is None and self.drafter.lacks_vocabulary:
            self._choose_vocabulary(datamodule)
        if stage != "predict" and "kl" in self.loss.reads:
            check_linear(self.target.head)
        self._check_confidence_head(stage)
        ours = self.drafter.config.block_size
        counted = getattr(datamodule, "block_size", ours)
        if stage != "predict" and counted != ours:
            raise UserError(
                f"The data counts slots for blocks of {counted}, the drafter drafts {ours}; give "
                "both the same block_size (train.py does so by itself)."
            )

    def _choose_vocabulary(self, datamodule: Any) -> None:
        """Takes the most frequent supervised tokens; all ranks see all rows, and choose alike."""
        assert self.drafter is not None
        size = self.drafter.config.draft_vocab_size
        assert size is not None
        counts_V = datamodule.train_rows.supervised_counts(self.target.vocab_size)
        kept_R = most_frequent(counts_V, size)
        self.drafter.choose_vocabulary(kept_R)
        inside = counts_V[kept_R.numpy()].sum() / max(1, counts_V.sum())
        rank_zero_info(
            f"[draft_vocab_size] drafts from {size} of {self.target.vocab_size} tokens, which are "
            f"{inside:.2%} of the supervised ones"
        )

    def _check_confidence_head(self, stage: str) -> None:
        """Raises UserError where a head is to be trained that is not there, or is there in vain."""
        assert self.drafter is not None
        has_head = self.drafter.confidence_head is not None
        if stage != "predict" and self.loss.reads_confidence and not has_head:
            raise UserError(
                "The loss trains a confidence head, and the drafter has none; set "
                "--model.confidence_head attached (or detached), or leave that term out."
            )
        if stage == "fit" and has_head and not self.loss.trains_confidence:
            raise UserError(
                "No term of the loss trains the confidence head; give a losses.Confidence "
                "a weight in --model.loss.extra (see configs/rivals/dspark.yaml), or set "
                "--model.confidence_head none."
            )

    def configure_model(self) -> None:
        """Shards the drafter if the strategy asks for it, and compiles it; once."""
        if self.drafter is None:  # load_from_checkpoint asks before there is one
            return
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not is_sharded(self.drafter):
            if self.hparams.log_gradient_norms_every:
                raise UserError(
                    "--model.log_gradient_norms_every needs whole gradients, which FSDP2 spreads "
                    "over the ranks; set it to 0, or use configs/trainer/ddp.yaml."
                )
            if self.hparams.optimizer == "muon" and self._fitting():
                raise UserError(
                    "--model.optimizer muon needs whole matrices, which FSDP2 spreads over the "
                    "ranks; use configs/trainer/ddp.yaml, or adamw with about a tenth of the "
                    "learning rate and --model.max_grad_norm 1."
                )
            shard(self.drafter, mesh)
        if self.hparams.compile_drafter:
            # dynamo would split what it compiles by DDP's buckets, and can't with flex_attention
            torch._dynamo.config.optimize_ddp = False
            # in place: state-dict keys stay as they are
            self.drafter.compile(options=INDUCTOR_OPTIONS)

    def whole_drafter(self) -> Drafter:
        """Returns the drafter for use outside a training step; all ranks call it together."""
        assert self.drafter is not None
        return whole(self.drafter, self.device)

    def attach(self, target: Target) -> None:
        """Borrows a target's embedding and head; makes the drafter for it if there is none.

        Raises:
            UserError: The drafter was made for a target of another width or depth.
        """
        self._target = target
        if self.drafter is None and self.hparams.init_from:
            self.drafter = self._start_from(self.continues or self.hparams.init_from, target)
        if self.drafter is None:
            self.drafter = Drafter(self._config_for(target))
            # a cache has no layers: the target would be loaded for what a checkpoint overwrites
            how: InitFromTarget = "norm" if self.continues else self.hparams.init_from_target
            layers = target.layers if how == "layers" else nn.ModuleList()
            initialise_from_target(self.drafter, target.final_norm, layers, how)
            target.let_go()
        config = self.drafter.config
        if config.draft_vocab_size is not None:
            check_draft_vocab_size(config.draft_vocab_size, target.vocab_size)
        ours = (config.hidden_size, config.num_target_layers)
        theirs = (target.hidden_size, target.num_layers)
        if ours != theirs:
            raise UserError(
                f"The drafter was made for a target of (hidden size, layers) {ours}, this target "
                f"has {theirs}; give the target that it was trained with."
            )
        target.check_layers(config.target_layer_ids)
        if config.mask_token_id >= target.vocab_size:
            raise UserError(
                f"The drafter's mask token id {config.mask_token_id} is beyond the target's "
                f"{target.vocab_size} embedding rows; give the target that it was trained with."
            )

    def _start_from(self, path: str, target: Target) -> Drafter:
        """Returns a drafter with another's weights, to be trained further."""
        loaded = load_drafter(path)
        check_fits(loaded, target)
        drafter = loaded.drafter
        drafter.float().train()
        config = drafter.config
        fitting = self._trainer is None or self._fitting()
        if not fitting and config.block_size != self.hparams.block_size:
            raise UserError(
                f"{path} drafts blocks of {config.block_size}, --model.block_size says "
                f"{self.hparams.block_size}; set --model.block_size {config.block_size}."
            )
        asked = self.hparams.target_layer_ids
        if asked is not None and tuple(asked) != config.target_layer_ids:
            raise UserError(
                f"--model.init_from {path} reads target layers {list(config.target_layer_ids)}, "
                f"--model.target_layer_ids says {list(asked)}; leave the latter out."
            )
        size = self.draft_vocab_size
        if size is not None and config.draft_vocab_size not in (None, size):
            raise UserError(
                f"--model.init_from {path} drafts from {config.draft_vocab_size} tokens, "
                f"--model.draft_vocab_size says {size}; leave the latter out."
            )
        if size is not None and config.draft_vocab_size is None:
            check_draft_vocab_size(size, target.vocab_size)
            drafter.reserve_vocabulary(size)  # its weights are the same for any of them
        config.block_size = self.hparams.block_size
        had, wanted = config.confidence_head, self.confidence_head != "none"
        if had != wanted and fitting:
            drafter.set_confidence_head(wanted)
            what = "a new confidence head" if wanted else "its confidence head is left out"
            rank_zero_info(f"[init_from] {path}: {what} (--model.confidence_head)")
        rank_zero_info(
            f"[init_from] {path}: {config.num_hidden_layers} layers, target layers "
            f"{list(config.target_layer_ids)}, mask token {config.mask_token_id}, as it has them; "
            f"K {config.block_size}, as this run says"
        )
        return drafter

    def _config_for(self, target: Target) -> DrafterConfig:
        hparams = self.hparams
        chosen = hparams.target_layer_ids
        if chosen is None:
            chosen = default_layer_ids(target.num_layers, hparams.num_taps)
        check_layer_ids(chosen, target.num_layers)
        if self.draft_vocab_size is not None:
            check_draft_vocab_size(self.draft_vocab_size, target.vocab_size)
        config = DrafterConfig.for_target(
            target.config,
            block_size=hparams.block_size,
            num_layers=hparams.num_layers,
            target_layer_ids=tuple(chosen),
            mask_token_id=choose_mask_token(
                target.tokenizer, target.vocab_size, hparams.mask_token_id
            ),
            intermediate_size=hparams.intermediate_size,
            draft_vocab_size=self.draft_vocab_size,
        )
        config.confidence_head = self.confidence_head != "none"
        return config

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the drafter's config and what target it belongs to, as plain values."""
        assert self.drafter is not None
        checkpoint[CHECKPOINT_KEY] = self.drafter.config.to_dict()
        checkpoint["schedule_origin"] = list(self.schedule_origin)
        if "optimizer_states" in checkpoint and not is_sharded(self.drafter):
            (state,) = checkpoint["optimizer_states"]
            (optimizer,) = self.trainer.optimizers
            checkpoint["optimizer_states"] = [number_as_module(state, optimizer, self)]
        if self._target is not None:
            checkpoint["target"] = {
                "path": self._target.path,
                "gguf_file": self._target.gguf_file,
                "fingerprint": self._target.fingerprint,
                "dtype": str(self._target.dtype).removeprefix("torch."),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the drafter that the checkpoint describes, so that its weights have a place.

        Raises:
            UserError: The run's own settings describe another drafter.
        """
        step, epoch = checkpoint.get("schedule_origin", (0, 0))
        self.schedule_origin = (step, epoch)
        trained_with = checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
        if self.hparams.optimizer != trained_with and self._fitting():
            raise UserError(
                f"The checkpoint was trained with --model.optimizer {trained_with}, this run says "
                f"{self.hparams.optimizer}; resume with {trained_with}, or start a new run from "
                "its weights with --model.init_from."
            )
        if self._fitting():  # the run's device may be another than the checkpoint's
            on_cuda = self.trainer.strategy.root_device.type == "cuda"
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    if "fused" in group:
                        group["fused"] = on_cuda
        saved = DrafterConfig.from_dict(checkpoint[CHECKPOINT_KEY])
        if self.drafter is None:
            self.drafter = Drafter(saved)
            return
        ours, theirs = self.drafter.config.to_dict(), saved.to_dict()
        ignored = ("dtype", "transformers_version", "_name_or_path")
        names = dict.fromkeys([*ours, "draft_vocab_size"])  # which is left out where it is None
        different = [k for k in names if ours.get(k) != theirs.get(k) and k not in ignored]
        if different:
            what = ", ".join(f"{k}: {theirs.get(k)} -> {ours.get(k)}" for k in different)
            raise UserError(
                f"The checkpoint holds another drafter than the settings ask for ({what}); resume "
                "with the checkpoint's settings, or start a new run."
            )

    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == "fit"

    # ------------------------------------------------------------------ what others ask

    @property
    def target(self) -> Target:
        """The borrowed target."""
        assert self._target is not None, "attach() has not run"
        return self._target

    @property
    def head(self) -> FrozenHead | ReducedHead:
        """The target's head as the drafter uses it."""
        assert self.drafter is not None
        return self.drafter.head(self.target.head)

    def feature_request(self) -> tuple[tuple[int, ...], LastHidden]:
        """Returns (tapped layer ids, what is needed of last_hidden) for the datamodule."""
        assert self.drafter is not None
        last: LastHidden = "soft_labels" if self.loss.needs_target else None
        # soft labels that are kept are over the whole vocabulary
        if self.loss.reads_whole or (last and self.drafter.config.draft_vocab_size is not None):
            last = "states"
        return self.drafter.config.target_layer_ids, last

    # ------------------------------------------------------------------ steps

    def forward(self, batch: DraftBatch, fixed_shape: bool = False) -> BlockScores:
        """Returns the scores (M, N) of a batch's blocks: one drafter forward, one scoring.

        Args:
            batch: With hidden states.
            fixed_shape: See `score_blocks`.
        """
        assert self.drafter is not None
        assert batch.hidden_states is not None
        config = self.drafter.config
        blocks = build_blocks(batch, config.block_size, config.mask_token_id)
        visibility = build_visibilities(
            config.layer_attention,
            batch.anchors,
            batch.document_ids,
            config.block_size,
            self.hparams.attention,
            config.head_dim,
            config.num_key_value_groups,
        )
        hidden_BAKD = self.drafter(
            batch.hidden_states,
            batch.positions,
            self.target.embed(blocks.input_ids),
            blocks.positions,
            visibility,
        )
        confidence_BAK = None
        if self.drafter.confidence_head is not None:
            states = hidden_BAKD.detach() if self.confidence_head == "detached" else hidden_BAKD
            confidence_BAK = self.drafter.confidence_head(states)
        return score_blocks(
            self.head,
            hidden_BAKD,
            blocks,
            batch.num_slots,
            soft=self._soft_labels(batch),
            target=self._target_states(batch),
            confidence=confidence_BAK,
            fixed_shape=fixed_shape,
            compiled=self.hparams.compile_drafter,
        )

    def _soft_labels(self, batch: DraftBatch) -> SoftLabels | None:
        """Returns the target's distributions at all B * S positions, if a loss asks for them."""
        if "kl" not in self.loss.reads:
            return None
        head = self.head
        if isinstance(head, ReducedHead):  # p renormalised over the kept tokens
            head = head.rows
        if batch.soft_labels is not None:
            return SoftLabels.unpacked(batch.soft_labels.flatten(0, 1), head)
        assert batch.last_hidden is not None
        return soft_labels(head, batch.last_hidden.flatten(0, 1))

    def _target_states(self, batch: DraftBatch) -> TargetStates | None:
        """Returns what those distributions are made of, if a loss asks for all of them."""
        if not self.loss.reads_whole:
            return None
        assert batch.last_hidden is not None
        states_PD = batch.last_hidden.flatten(0, 1)
        head = self.head
        reduced = head if isinstance(head, ReducedHead) else None
        return TargetStates(states_PD, self.loss.temperature, self.loss.reads_whole, reduced)

    def training_step(self, batch: DraftBatch, batch_idx: int) -> Tensor:
        """Returns the loss, scaled so that the optimizer sees the single-process window's loss."""
        self._settle()
        self._batch = batch
        # only what will be written: ten metrics of every step cost as much as a small drafter
        logs = self.trainer._logger_connector.should_update_logs
        gradients = logs and self._gradients_due()
        # a recorded backward pass can be done once only
        graphs = None if gradients else self._graphs
        scores = self(batch) if graphs is None else graphs(batch)
        out = self.loss(scores, self._progress(), batch.window_counts, sum_over_ranks)
        if logs:
            self._log.add(out, scores)
        if gradients:
            self._log.add_gradients(out, [p for p in self.parameters() if p.requires_grad])
        accumulate = self.trainer.accumulate_grad_batches
        last = batch_idx + 1
        if logs and (last % accumulate == 0 or last == self.trainer.num_training_batches):
            self._log_window(out)
        # Lightning divides by the accumulation, DDP averages over ranks: undo both
        scaled: Tensor = out.total * accumulate * self.trainer.world_size
        return scaled

    def _gradients_due(self) -> bool:
        """Returns whether this is the first logged step since a multiple of the setting."""
        every: int = self.hparams.log_gradient_norms_every
        done = self.global_step + 1
        return every > 0 and done // every > (done - self.trainer.log_every_n_steps) // every

    def _log_window(self, out: LossOutput) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._guard.action == "skip":
            self.log("train/skipped_steps", float(self._guard.skipped))
        on_the_bar = {"cross_entropy": "ce", "accepted_length": "tau"}
        for name, value in self._log.pop(sum_over_ranks, out.weights).items():
            self.log(f"train/{name}", value, on_step=True, on_epoch=False)
            if name in on_the_bar:
                self._for_bar[on_the_bar[name]] = value

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows on the progress bar what a logged step gave.

        As host numbers: Lightning converts the bar's numbers after every step, logged or not, and
        would wait for the device each time.
        """
        if self._for_bar:
            numbers = torch.stack(list(self._for_bar.values())).cpu()
            for name, value in zip(self._for_bar, numbers, strict=True):
                self.log(name, value, prog_bar=True, logger=False)
            self._for_bar = {}

    def on_validation_epoch_start(self) -> None:
        """Forgets sums of an interrupted validation."""
        self._val_log = WindowLog()

    def validation_step(self, batch: DraftBatch, batch_idx: int) -> None:
        """Adds a batch of held-out blocks to the epoch's sums."""
        scores = self(batch)
        self._val_log.add(self.loss(scores, self._progress()), scores)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's ratios: summed numerators over summed denominators of all ranks."""
        if self.trainer.sanity_checking:
            return
        weights = self.loss.weights(self._progress())
        for name, value in self._val_log.pop(sum_over_ranks, weights).items():
            # val/accepted_length is the verification callback's: this is an estimate from blocks
            name = "block_accepted_length" if name == "accepted_length" else name
            stage = "test" if self.trainer.testing else "val"
            self.log(f"{stage}/{name}", value, prog_bar=name == "cross_entropy")

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: DraftBatch, batch_idx: int) -> None:
        """As in validation: the held-out rows are the datamodule's business."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs what validation logs, under test/."""
        self.on_validation_epoch_end()

    def gather(self) -> None:
        """Makes a sharded drafter whole for `predict`; the datamodule calls it on every rank.

        No hook of Lightning's does: a rank without a prompt is not asked to predict at all.
        """
        self._predicting = (self.whole_drafter().eval(),)  # a tuple: it is no submodule

    def predict_step(self, batch: EvalPrompt, batch_idx: int) -> dict[str, Any]:
        """Returns one prompt's response by the real speculative loop, as plain values."""
        if self._predicting is None:
            self.gather()
        assert self._predicting is not None
        return predict_prompt(self._predicting[0], self.target, batch, self.decoding)

    # ------------------------------------------------------------------ optimisation

    def _total_steps(self) -> int:
        """Returns the length of all schedules in optimizer steps, from the configuration."""
        if self.hparams.total_steps is not None:
            return int(self.hparams.total_steps)
        if self.trainer.max_steps is not None and self.trainer.max_steps > 0:
            return int(self.trainer.max_steps)
        if self.trainer.max_epochs is None or self.trainer.max_epochs < 1:
            raise UserError(
                "The schedules need an end: set trainer.max_epochs, trainer.max_steps or "
                "model.total_steps."
            )
        steps = self.trainer.datamodule.steps_per_epoch()  # type: ignore[attr-defined]
        before, epoch = self.schedule_origin
        total: int = max(1, before + (self.trainer.max_epochs - epoch) * steps)
        return total

    def _progress(self) -> float:
        if self.trainer.state.fn != "fit":
            return 1.0
        return float(min(1.0, self.global_step / self._total_steps()))

    def _settings(self) -> OptimiserSettings:
        hparams = self.hparams
        return OptimiserSettings(
            hparams.learning_rate,
            hparams.weight_decay,
            tuple(hparams.betas),
            hparams.warmup_fraction,
            hparams.final_lr_fraction,
            hparams.optimizer,
            hparams.momentum,
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns the optimizer and a per-step schedule: linear warm-up, then cosine."""
        optimizer, scheduler = make_optimizer(
            self.parameters(),
            self._settings(),
            self._total_steps(),
            fused=self.device.type == "cuda",
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _make_graphs(self) -> StepGraphs | None:
        """Returns the recordings of this fit, or None to launch every kernel."""
        assert self.drafter is not None
        if not self.hparams.cuda_graphs or self.device.type != "cuda":
            return None
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rope = (self.drafter.config.rope_parameters or {}).get("rope_type", "default")
        reasons = {
            "FSDP2 gathers weights anew in every step": is_sharded(self.drafter),
            "packed batches seldom have the same shape": datamodule.pack_length > 0,
            "batches seldom have the same shape without data.pad_multiple, such as 64": (
                datamodule.pad_multiple == 1
            ),
            "the target is spread over several GPUs": self.target.spread,
            f"rope of type {rope} asks the host": rope in ("dynamic", "longrope"),
        }
        for reason, applies in reasons.items():
            if applies:
                rank_zero_info(f"[cuda_graphs] not used: {reason}")
                return None
        trained = [p for p in self.parameters() if p.requires_grad]
        return StepGraphs(partial(self.forward, fixed_shape=True), trained)

    def on_train_start(self) -> None:
        """Lets the settings of this run win over those in a resumed optimizer's state."""
        self._graphs = self._make_graphs()
        for optimizer, config in zip(
            self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True
        ):
            assert isinstance(config.scheduler, torch.optim.lr_scheduler.LambdaLR)
            apply_settings(optimizer, config.scheduler, self._settings(), self._total_steps())

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips here: Lightning refuses fused AdamW with its own clipping (lightning-traps 4)."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm {gradient_clip_algorithm!r} is not supported; gradients "
                "are clipped by norm."
            )
        limit = gradient_clip_val if gradient_clip_val is not None else self.hparams.max_grad_norm
        norm = clip(optimizer, self.parameters(), limit)
        if self.trainer._logger_connector.should_update_logs:
            self.log("train/grad_norm", norm)
        assert self._batch is not None
        self._guard.protect(optimizer, self.parameters(), norm, self._batch, self.global_step)

    def on_train_end(self) -> None:
        """Looks at the last steps too."""
        self._graphs = None
        self._settle(everything=True)

    def _settle(self, everything: bool = False) -> None:
        checkpoint = self.trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None)
        place = Path(folder).parent if folder else Path(self.trainer.default_root_dir)
        self._guard.settle(place, self.trainer.global_rank, everything=everything)
