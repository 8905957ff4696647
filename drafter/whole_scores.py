"""Scores of a slot that need both whole distributions, the drafter's and the target's.

Legend: T slots, P positions, C slots of a chunk, D hidden size, V vocabulary.

Unlike KL(p || q) (`drafter.soft_labels`) they are no functions of a mean row, so the target's
logits are made again for each slot, from its last hidden state and the frozen head. With
q = softmax(z / tau) and p alike of the target's logits, their gradients in the drafter's logits are

    overlap     a = sum_v min(p_v, q_v)         da/dz_v = q_v (1[q_v < p_v] - sum_{q < p} q) / tau
    reverse KL  r = sum_v q_v log(q_v / p_v)    dr/dz_v = q_v (log(q_v / p_v) - r) / tau
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafter.draft_vocabulary import ReducedHead
from drafter.head import FrozenHead, cap_slope, weighted_rows


class TargetStates(NamedTuple):
    """The target's distribution of the next token as its head makes it, and what to make of it."""

    hidden: Tensor
    """(P, D), what the head reads."""
    temperature: float
    """tau, above 0: divides both models' logits."""
    names: tuple[str, ...]
    """Which of `losses.scores.WHOLE_SCORES` are wanted."""
    reduced: ReducedHead | None = None
    """Where q is over a reduced draft vocabulary. p is over all tokens, and scores sum over the
    kept ones, for q is 0 elsewhere."""

    def at(self, where: Tensor | slice) -> TargetStates:
        """Returns those at positions (T,), or of a run of positions."""
        return self._replace(hidden=self.hidden[where])

    def scores(
        self, head: FrozenHead, logits_CV: Tensor, with_slope: bool
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns each wanted score (C,) and, if asked for, its slope in the state (C, D).

        Args:
            head: The target's frozen head, or those of its rows that q is over.
            logits_CV: The drafter's of as many slots, in fp32 or fp64; left as they are.
            with_slope: Whether slopes are wanted.
        """
        whole = head if self.reduced is None else self.reduced.whole
        log_p_CV = _log_probs(whole.logits(self.hidden), self.temperature)
        if self.reduced is not None:
            log_p_CV = log_p_CV.index_select(-1, self.reduced.kept)
        log_q_CV = _log_probs(logits_CV, self.temperature)
        return {
            name: self._score(name, head, logits_CV, log_p_CV, log_q_CV, with_slope)
            for name in self.names
        }

    def _score(
        self,
        name: str,
        head: FrozenHead,
        logits_CV: Tensor,
        log_p_CV: Tensor,
        log_q_CV: Tensor,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor | None]:
        score = {"overlap": _overlap, "reverse_kl": _reverse_kl}[name]
        score_C1, weights_CV = score(log_p_CV, log_q_CV, with_slope)
        if weights_CV is None:
            return score_C1.squeeze(-1), None
        if head.softcap is not None:
            weights_CV = weights_CV * cap_slope(logits_CV, head.softcap)
        # relative to the largest: most weights are below what an fp16 head's dtype can hold
        largest_C1 = weights_CV.abs().amax(-1, keepdim=True)
        largest_C1.clamp_(min=torch.finfo(weights_CV.dtype).tiny)
        slope_CD = weighted_rows(head, weights_CV.div_(largest_C1).to(head.weight.dtype))
        return score_C1.squeeze(-1), slope_CD * (largest_C1 * (head.scale / self.temperature))


def _log_probs(logits_CV: Tensor, temperature: float) -> Tensor:
    return (logits_CV if temperature == 1.0 else logits_CV / temperature).log_softmax(-1)


def _overlap(log_p_CV: Tensor, log_q_CV: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the overlap (C, 1), and tau times its gradient in the drafter's logits (C, V)."""
    score_C1 = log_p_CV.minimum(log_q_CV).exp_().sum(-1, keepdim=True).clamp_(max=1)  # rounding
    if not with_slope:
        return score_C1, None
    q_CV = log_q_CV.exp()
    less_CV = q_CV * (log_q_CV < log_p_CV)
    return score_C1, less_CV - q_CV * less_CV.sum(-1, keepdim=True)


def _reverse_kl(
    log_p_CV: Tensor, log_q_CV: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns KL(q || p) (C, 1), and tau times its gradient in the drafter's logits (C, V)."""
    q_CV, gap_CV = log_q_CV.exp(), log_q_CV - log_p_CV
    score_C1 = (q_CV * gap_CV).sum(-1, keepdim=True)
    return score_C1, q_CV * (gap_CV - score_C1) if with_slope else None
