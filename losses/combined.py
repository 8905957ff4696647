"""The combined loss: named terms with weights and schedules, reduced over ranks and windows.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from losses.chain import Chain, Normalize
from losses.first_error import FirstErrorFocal
from losses.forward_kl import ForwardKL
from losses.positional import PositionalCrossEntropy
from losses.ratio import Ratio, Term
from losses.schedule import Schedule
from losses.scores import CONFIDENCE, TARGET_SCORES, WHOLE_SCORES, BlockScores

CROSS_ENTROPY = "cross_entropy"
CROSS_ENTROPY_UNIFORM = "cross_entropy_uniform"
FOCAL = "focal"
CHAIN = "chain"
FORWARD_KL = "forward_kl"

ALPHAS = ("alpha_cross_entropy", "alpha_focal", "alpha_chain", "alpha_kl")
"""Fields of `CombinedLoss` that are weights of its named terms."""


@dataclass
class WeightedTerm:
    """One more term of the total.

    Args:
        term: A subclass of `losses.ratio.Term`.
        weight: Its weight in the total, negative for what is to be maximised; 0 only reports it.
        schedule: Factor on the weight over the run.
    """

    term: Term
    weight: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(eq=False)
class LossOutput:
    """What a step needs of its loss.

    Args:
        total: 0-d, this rank's and micro-batch's share: shares of all ranks and micro-batches add
            up to the single-process loss of the whole window, and so do their gradients.
        terms: This micro-batch's terms, unweighted and not reduced; add them up and divide to log.
        weights: The weight of each term in the total at this step, with its sign.
        contributions: Each weighted term's part of `total`, 0-d and in its graph, for gradients by
            term. Terms whose weight is 0 at this step have none.
    """

    total: Tensor
    terms: dict[str, Ratio]
    weights: dict[str, float]
    contributions: dict[str, Tensor]


@dataclass(frozen=True)
class CombinedLoss:
    """L = alpha_ce L_ce + alpha_focal L_focal - alpha_chain R + alpha_kl L_kl, by paper defaults.

    Source: method.md, "The three interventions" and "Reductions"; L_kl, which is not the paper's,
    see `ForwardKL`.

    Args:
        gamma: Positions over which cross-entropy's positional weight exp(-(k-1)/gamma) falls by a
            factor of e; .inf for uniform cross-entropy.
        alpha_focal: Weight of the first-error focal loss; 0 switches it off.
        alpha_chain: Weight of the chain term R, which is subtracted; 0 switches it off.
        focal_modulation: Exponent g of a factor (1 - q)^g on the focal loss; 0 for none.
        focal_positional: Multiply the focal loss by the positional weight of the first error.
        chain_normalize: Divide a block's chain by its drafted slots (`block`, the paper's), by its
            valid slots (`valid`), or not at all (`none`).
        focal_schedule: Factor on alpha_focal over the run.
        chain_schedule: Factor on alpha_chain over the run.
        extra: More terms by name, each with its weight and schedule.
        alpha_cross_entropy: Weight of cross-entropy, the paper's 1; 0 leaves the rest alone.
        alpha_kl: Weight of the divergence from the target's whole distribution, with gamma's
            positional weights; 0 (the paper's) leaves it out, and the target's distribution too.

    Raises:
        ValueError: A setting out of range, an extra term under a name that is taken, or nothing
            that has a weight.

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> scores = BlockScores(torch.full((1, 2), 0.5).log(), ~mask, mask)
        >>> out = CombinedLoss(gamma=float("inf"))(scores, progress=0.0)
        >>> {name: round(ratio.value.item(), 4) for name, ratio in out.terms.items()}
        {'cross_entropy': 0.6931, 'cross_entropy_uniform': 0.6931, 'focal': 0.6931, 'chain': 0.375}
        >>> out.total  # 0.6931 + 0.3 * 0.6931 - 40 * 0.375
        tensor(-14.0989)
    """

    gamma: float = 10.0
    alpha_focal: float = 0.3
    alpha_chain: float = 40.0
    focal_modulation: float = 0.0
    focal_positional: bool = False
    chain_normalize: Normalize = "block"
    focal_schedule: Schedule = field(default_factory=Schedule)
    chain_schedule: Schedule = field(default_factory=Schedule)
    extra: dict[str, WeightedTerm] | None = None
    alpha_cross_entropy: float = 1.0
    alpha_kl: float = 0.0

    def __post_init__(self) -> None:
        # a checkpoint's hyper-parameters are plain values, so schedules may come as dicts
        for name in ("focal_schedule", "chain_schedule"):
            schedule = getattr(self, name)
            if isinstance(schedule, dict):
                object.__setattr__(self, name, Schedule(**schedule))
        for name in ALPHAS:
            alpha = getattr(self, name)
            if not (alpha >= 0 and math.isfinite(alpha)):
                raise ValueError(
                    f"{name} is {alpha}; give a finite weight of 0 or more (0 switches it off)."
                )
        for name, extra in (self.extra or {}).items():
            if name in (CROSS_ENTROPY, CROSS_ENTROPY_UNIFORM, FOCAL, CHAIN, FORWARD_KL):
                raise ValueError(
                    f"An extra loss term is called {name!r}; give it a name of its own."
                )
            if not isinstance(extra, WeightedTerm) or not math.isfinite(extra.weight):
                raise ValueError(
                    f"The extra loss term {name!r} is {extra!r}; give a WeightedTerm with a term "
                    "and a finite weight."
                )
        extras = [term.weight for term in (self.extra or {}).values()]
        if not any((*(getattr(self, name) for name in ALPHAS), *extras)):
            raise ValueError("Every weight of the loss is 0; give at least one term a weight.")
        # every term checks its own settings
        found = {term.temperature for term in self.terms.values() if term.reads}
        if len(found) > 1:
            raise ValueError(
                "The loss's terms read the target's distribution at different temperatures "
                f"({', '.join(map(str, sorted(found)))}; KL(p || q) is at 1); give them one."
            )

    @cached_property
    def terms(self) -> dict[str, Term]:
        """The terms by name; which ones, and their order, depends on settings only."""
        terms: dict[str, Term] = {
            CROSS_ENTROPY: PositionalCrossEntropy(self.gamma),
            FOCAL: FirstErrorFocal(
                self.focal_modulation, self.gamma if self.focal_positional else None
            ),
            CHAIN: Chain(self.chain_normalize),
        }
        if self.alpha_kl:
            terms[FORWARD_KL] = ForwardKL(self.gamma)
        terms.update((name, extra.term) for name, extra in (self.extra or {}).items())
        return terms

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> CombinedLoss:
        """Returns the loss of a checkpoint's plain values, which have no extra terms.

        Where those were all that had a weight, cross-entropy stands in their place.
        """
        weighted = any(saved.get(name) for name in ALPHAS)
        return cls(**saved) if weighted else cls(**{**saved, "alpha_cross_entropy": 1.0})

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Which of `TARGET_SCORES` the terms read, in their order."""
        read = frozenset().union(*(term.reads for term in self.terms.values()))
        return tuple(name for name in TARGET_SCORES if name in read)

    @property
    def reads_confidence(self) -> bool:
        """Whether a term reads what the drafter's confidence head says."""
        return any(CONFIDENCE in term.reads for term in self.terms.values())

    @property
    def trains_confidence(self) -> bool:
        """Whether such a term has a weight at some time of the run."""
        return any(
            CONFIDENCE in extra.term.reads and extra.weight != 0 and not extra.schedule.silent
            for extra in (self.extra or {}).values()
        )

    @property
    def needs_target(self) -> bool:
        """Whether a term reads the target's distribution."""
        return bool(self.reads)

    @property
    def reads_whole(self) -> tuple[str, ...]:
        """Which of them need the whole distribution at every slot, not its mean rows."""
        return tuple(name for name in self.reads if name in WHOLE_SCORES)

    @property
    def temperature(self) -> float:
        """Of the distributions that the terms read."""
        return next((term.temperature for term in self.terms.values() if term.reads), 1.0)

    def weights(self, progress: float) -> dict[str, float]:
        """Returns each term's weight in the total, with its sign.

        Args:
            progress: Share of the run's steps that is done, 0 to 1.
        """
        weights = {
            CROSS_ENTROPY: self.alpha_cross_entropy,
            FOCAL: self.alpha_focal * self.focal_schedule.multiplier(progress),
            CHAIN: 0.0 - self.alpha_chain * self.chain_schedule.multiplier(progress),
        }
        if self.alpha_kl:
            weights[FORWARD_KL] = self.alpha_kl
        for name, extra in (self.extra or {}).items():
            weights[name] = extra.weight * extra.schedule.multiplier(progress)
        return weights

    def __call__(
        self,
        scores: BlockScores,
        progress: float,
        counts_N: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        """Returns this rank's share of the window's loss, and the terms to log.

        Args:
            scores: This micro-batch's blocks; none of them may be valid, the total is then 0 and
                still connected to `log_prob`.
            progress: Share of the run's steps that is done, 0 to 1; the same on every rank.
            counts_N: (N,), this rank's valid slots at each position over its whole accumulation
                window; None if the window is this micro-batch.
            reduce: Sums a flat vector over ranks; None for a single process. It is called exactly
                once, with a vector whose length is the same on every rank.

        Raises:
            ValueError: counts_N is not of shape (N,).
        """
        weights = self.weights(progress)
        ratios = {}
        for name, term in self.terms.items():
            ratio = term(scores)
            ratios[name] = ratio if weights[name] != 0 else ratio.detach()
        denominators = _window_denominators(scores, self.terms, ratios, counts_N, reduce)
        contributions = {
            name: weights[name] * Ratio(ratio.numerator, denominators[name]).value
            for name, ratio in ratios.items()
            if weights[name] != 0
        }
        parts = list(contributions.values())
        # schedules may silence every term for a while, or all but that of a head whose state is
        # detached: the total is connected all the same
        if not parts or scores.confidence is not None:
            parts.append(0.0 * scores.reachable_log_prob.sum())
        if scores.confidence is not None:
            parts.append(0.0 * scores.confidence.sum())  # so is the head
        total = torch.stack(parts).sum()
        with torch.no_grad():
            uniform = PositionalCrossEntropy(math.inf)(scores)
        reported = {CROSS_ENTROPY: ratios.pop(CROSS_ENTROPY), CROSS_ENTROPY_UNIFORM: uniform}
        return LossOutput(total, {**reported, **ratios}, weights, contributions)


@torch.no_grad()
def _window_denominators(
    scores: BlockScores,
    terms: dict[str, Term],
    ratios: dict[str, Ratio],
    counts_N: Tensor | None,
    reduce: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Returns what each term's local numerator is divided by, 0-d (method.md, "Reductions").

    Labels alone decide: the denominator of the window and all ranks. Predictions decide too: the
    denominator of the micro-batch on all ranks, over its share of the window's valid blocks.
    """
    num_slots = scores.log_prob.shape[1]
    micro_N = scores.counts_N.to(scores.log_prob.dtype)
    window_N = micro_N if counts_N is None else counts_N.to(micro_N)
    if window_N.shape != (num_slots,):
        raise ValueError(
            f"The window's counts have shape {tuple(window_N.shape)}; give one count for each of "
            f"the {num_slots} drafted slots."
        )
    micro = torch.stack([micro_N[0], *(ratio.denominator for ratio in ratios.values())])
    vector = torch.cat([window_N, micro.to(micro_N.dtype)])
    if reduce is not None:
        vector = reduce(vector)
    window_N, micro_blocks, micro = vector.tensor_split([num_slots, num_slots + 1])
    window_blocks = window_N[0]
    denominators = {}
    for name, micro_denominator in zip(terms, micro, strict=True):
        denominator = terms[name].window_denominator(window_N)
        if denominator is None:
            share = Ratio(micro_blocks[0], window_blocks).value
            denominator = Ratio(micro_denominator, share).value
        denominators[name] = denominator
    return denominators
