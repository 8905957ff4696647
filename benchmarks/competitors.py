"""One training step of a DFlash drafter: ours, and those of other packages, on the same inputs.

Legend: B rows, S tokens, A blocks per row, K block size, L tapped layers, D hidden size.

Each is built as its own package builds it (its modules, its scoring, its optimizer), with the
target's embedding and head lent by one random target. What differs: `specforge` keeps bf16 weights
and fp32 masters in its optimizer; `speculators` and ours keep fp32 weights under autocast.
`speculators` computes the target's distribution too, for its losses.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafter.blocks import DraftBatch, count_valid
from drafter.graphs import StepGraphs
from drafter.guard import NonFiniteGuard
from drafter.module import DrafterModule
from drafter.optimisation import OptimiserSettings, clip, make_optimizer
from drafter.target import Target
from losses import CombinedLoss

LEARNING_RATE = 1e-4
LONG = 100_000  # steps of every schedule: none ends here


@dataclass(frozen=True)
class Case:
    """What a step is given.

    Attributes:
        target: Lends embedding and head; its shapes are the drafter's.
        layers: Drafter layers.
        block_size: K.
        batch: Rows of S tokens with A anchors and features, all but their first tokens supervised.
    """

    target: Target
    layers: int
    block_size: int
    batch: DraftBatch

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.batch.input_ids.device

    @property
    def features(self) -> Tensor:
        """(B, S, L*D)."""
        assert self.batch.hidden_states is not None
        return self.batch.hidden_states

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 on a GPU; on a CPU everything is fp32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )


def make_case(
    target: Target,
    *,
    tokens: int,
    anchors: int,
    layers: int,
    taps: int,
    block_size: int,
    seed: int = 0,
    rows: int = 1,
) -> Case:
    """Returns inputs of random numbers.

    Args:
        target: See `Case`.
        tokens: S.
        anchors: A; at most S - 2 fit.
        layers: Drafter layers.
        taps: L.
        block_size: K.
        seed: Of the numbers.
        rows: B.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, target.vocab_size, (rows, tokens), generator=generator)
    drawn = [torch.randperm(tokens - 2, generator=generator)[:anchors] + 1 for _ in range(rows)]
    supervised = torch.ones(rows, tokens, dtype=torch.bool)
    supervised[:, 0] = False
    states = torch.randn(rows, tokens, taps * target.hidden_size, generator=generator)
    batch = DraftBatch(
        input_ids=ids,
        supervised=supervised,
        document_ids=torch.zeros_like(ids),
        positions=torch.arange(tokens).expand(rows, -1),
        anchors=torch.stack(drawn).sort(1).values,
        sample_ids=torch.arange(rows),
    )
    batch.num_slots = int(count_valid(batch, block_size).sum())
    batch = batch.to(target.device)
    batch.hidden_states = states.to(target.device, target.dtype)
    return Case(target, layers, block_size, batch)


class Competitor(abc.ABC):
    """A drafter in training. `forward`, then `backward` of what it gave, then `update`."""

    name: str

    @abc.abstractmethod
    def forward(self) -> Tensor:
        """Returns the loss ()."""

    def backward(self, loss: Tensor) -> None:
        """Fills the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    @abc.abstractmethod
    def update(self) -> None:
        """Clips, steps and drops the gradients."""

    @abc.abstractmethod
    def kept(self) -> Iterator[Tensor]:
        """Yields the tensors that live between steps: weights and optimizer state."""


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yields an optimizer's tensors."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class Ours(Competitor):
    """This package's module, loss, optimizer and guard, as `train.py fit` runs them.

    Args:
        case: Inputs.
        loss: What is trained on.
        compiled: `model.compile_drafter`.
        graphs: `model.cuda_graphs`.
        name: In the table.
    """

    def __init__(
        self,
        case: Case,
        loss: CombinedLoss,
        *,
        compiled: bool = False,
        graphs: bool = False,
        name: str = "ours",
    ) -> None:
        self.name = name
        self.case = case
        self.loss = loss
        self.module = DrafterModule(
            block_size=case.block_size,
            num_layers=case.layers,
            num_taps=case.features.shape[-1] // case.target.hidden_size,
            mask_token_id=0,
            init_from_target="none",
            compile_drafter=compiled,
        )
        with torch.device(case.device):  # a large drafter takes a CPU long to make
            self.module.attach(case.target)
        self.module.to(case.device)
        self.module.configure_model()
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        settings = OptimiserSettings(LEARNING_RATE, 0.0, (0.9, 0.95), 0.015, 0.0)
        self.optimizer, self.scheduler = make_optimizer(
            self.trained, settings, LONG, fused=case.device.type == "cuda"
        )
        self.guard = NonFiniteGuard("skip")
        self.scores: Callable[[DraftBatch], Any] = self.module
        if graphs:
            self.scores = StepGraphs(partial(self.module.forward, fixed_shape=True), self.trained)
        self.steps = 0

    def forward(self) -> Tensor:
        """See `Competitor`."""
        with self.case.autocast():
            return self.loss(self.scores(self.case.batch), 0.5).total

    def update(self) -> None:
        """See `Competitor`."""
        norm = clip(self.optimizer, self.trained, self.module.hparams.max_grad_norm)
        self.guard.protect(self.optimizer, self.trained, norm, self.case.batch, self.steps)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.guard.settle(Path(), 0)
        self.steps += 1

    def kept(self) -> Iterator[Tensor]:
        """See `Competitor`."""
        yield from self.module.parameters()
        yield from states_of(self.optimizer)


class SpecForge(Competitor):
    """`specforge`: bf16 weights, its own flex_attention, chunked scoring and fp32-master AdamW."""

    name = "specforge"

    def __init__(self, case: Case, attention: str | None = None) -> None:
        family = importlib.import_module("specforge.algorithms.common.dflash_family_model")
        draft = importlib.import_module("specforge.modeling.draft.dflash")
        optimizer = importlib.import_module("specforge.optimizer")
        qwen3 = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
        self.case = case
        attention = attention or self.default_attention(case)
        config = qwen3.Qwen3Config(**_qwen3_fields(case))
        config._attn_implementation = attention
        config.block_size = case.block_size
        config.num_target_layers = case.target.num_layers
        config.dflash_config = {"target_layer_ids": list(_taps(case)), "mask_token_id": 0}
        with torch.device(case.device):
            self.drafter = draft.DFlashDraftModel(config)
        self.drafter.to(case.target.dtype)
        self.model = family.OnlineDFlashModel(
            self.drafter,
            case.target.model.get_output_embeddings(),
            case.target.model.get_input_embeddings(),
            mask_token_id=0,
            block_size=case.block_size,
            attention_backend=attention,
            num_anchors=case.batch.anchors.shape[1],
        )
        self.optimizer = optimizer.BF16Optimizer(
            self.drafter, lr=LEARNING_RATE, max_grad_norm=1.0, total_steps=LONG
        )
        self.loss_mask = case.batch.supervised.float()

    @staticmethod
    def default_attention(case: Case) -> str:
        """What its own recipes run."""
        return "flex_attention" if case.device.type == "cuda" else "eager"

    def forward(self) -> Tensor:
        """See `Competitor`."""
        batch = self.case.batch
        loss: Tensor = self.model(batch.input_ids, self.case.features, self.loss_mask)[0]
        return loss

    def update(self) -> None:
        """See `Competitor`."""
        self.optimizer.step()

    def kept(self) -> Iterator[Tensor]:
        """See `Competitor`."""
        yield from self.drafter.parameters()
        yield from self.optimizer.fp32_params
        yield from states_of(self.optimizer.optimizer)


class Speculators(Competitor):
    """`speculators`: fp32 weights under autocast, its own flex_attention, whole logits.

    Args:
        case: Inputs.
        losses: `fused` (Triton) or `eager`.
        compiled: Its forward is compiled by itself on a GPU; False runs it as it is.
    """

    def __init__(self, case: Case, losses: str = "fused", compiled: bool = True) -> None:
        core = importlib.import_module("speculators.models.dflash.core")
        settings = importlib.import_module("speculators.models.dflash.config")
        qwen3 = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
        resolve = importlib.import_module("speculators.losses").resolve_loss_config
        self.name = f"speculators, {losses} loss" + ("" if compiled else ", not compiled")
        self.case = case
        layers = qwen3.Qwen3Config(**_qwen3_fields(case))
        on_gpu = case.device.type == "cuda"
        layers._attn_implementation = "simple_flex_attention" if on_gpu else "eager"
        config = settings.DFlashSpeculatorConfig(
            transformer_layer_config=layers,
            draft_vocab_size=case.target.vocab_size,
            block_size=case.block_size,
            aux_hidden_state_layer_ids=list(_taps(case)),
            mask_token_id=0,
            speculators_config=_no_verifier(case),
        )
        with torch.device(case.device):
            self.model = core.DFlashDraftModel(config)
        lent = case.target.model
        self.model.embed_tokens.weight = lent.get_input_embeddings().weight
        for head in (self.model.lm_head, self.model.verifier_lm_head):
            head.weight = lent.get_output_embeddings().weight
        self.model.to(case.device)
        self.run: Callable[..., Any] = self.model
        if not compiled:
            plain = type(self.model).forward
            plain = getattr(plain, "_torchdynamo_orig_callable", plain)
            self.run = partial(plain, self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)
        self.loss_config = resolve("ce", losses)
        generator = torch.Generator().manual_seed(1)
        shape = (1, case.batch.input_ids.shape[1], case.target.hidden_size)
        last = torch.randn(shape, generator=generator)
        self.last_hidden = last.to(case.device, case.target.dtype)

    def forward(self) -> Tensor:
        """See `Competitor`."""
        batch = self.case.batch
        with self.case.autocast():
            _, loss, _ = self.run(
                hidden_states=self.case.features,
                input_ids=batch.input_ids,
                loss_mask=batch.supervised,
                verifier_last_hidden_states=self.last_hidden,
                document_ids=batch.document_ids,
                position_ids=batch.positions,
                loss_config=self.loss_config,
                gamma=4.0,
                max_anchors=batch.anchors.shape[1],
            )
        assert isinstance(loss, Tensor)
        return loss

    def update(self) -> None:
        """See `Competitor`."""
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept(self) -> Iterator[Tensor]:
        """See `Competitor`."""
        yield from self.trained
        yield from states_of(self.optimizer)
        yield self.last_hidden


def _taps(case: Case) -> range:
    return range(case.features.shape[-1] // case.target.hidden_size)


def _qwen3_fields(case: Case) -> dict[str, Any]:
    config = case.target.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    return {
        **{name: getattr(config, name) for name in names},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "num_hidden_layers": case.layers,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": False,
    }


def _no_verifier(case: Case) -> Any:
    """Returns `speculators`' description of a target that lies nowhere."""
    config = importlib.import_module("speculators.config")
    proposals = importlib.import_module("speculators.proposals.greedy")
    return config.SpeculatorsConfig(
        algorithm="dflash",
        proposal_methods=[
            proposals.GreedyTokenProposalConfig(speculative_tokens=case.block_size - 1)
        ],
        default_proposal_method="greedy",
        verifier=config.VerifierConfig(
            name_or_path=None, architectures=case.target.model.config.architectures or []
        ),
    )


def step_arithmetic(case: Case) -> float:
    """Returns the floating-point operations of a step's matrix products and attention.

    Model arithmetic only: two for each multiplication, nothing recomputed. Backward counts twice
    the forward, but for `fc` (features need no gradient) and the head (its weights don't).
    """
    config = case.target.config
    width, inner, layers = config.hidden_size, config.intermediate_size, case.layers
    kv = width * config.num_key_value_heads // config.num_attention_heads
    tokens = case.batch.input_ids.numel()
    slots = case.batch.anchors.numel() * case.block_size
    seen = float(case.batch.anchors.sum()) * case.block_size + slots * case.block_size
    assert case.batch.num_slots is not None
    projections = layers * slots * width * (2 * width + 2 * kv + 3 * inner)
    context = layers * tokens * width * 2 * kv
    attention = layers * 2 * seen * width
    features = tokens * case.features.shape[-1] * width
    scoring = case.batch.num_slots * width * config.vocab_size
    return 2.0 * (3 * (projections + context + attention) + 2 * features + 2 * scoring)


def full_stack() -> CombinedLoss:
    """Returns the paper's loss: decay, first-error focal and chain."""
    return CombinedLoss()


def plain() -> CombinedLoss:
    """Returns uniform cross-entropy."""
    return CombinedLoss(gamma=math.inf, alpha_focal=0.0, alpha_chain=0.0)
