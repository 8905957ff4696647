"""First-error focal loss, the second of the three interventions.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.positional import check_gamma, positional_weights
from losses.ratio import Ratio, Term
from losses.scores import BlockScores


def first_errors(scores: BlockScores) -> Tensor:
    """Returns (M, N) bool, true at j* (the first valid slot that is wrong) and nowhere else."""
    wrong_MN = scores.valid & ~scores.correct
    return wrong_MN & (wrong_MN.cumsum(dim=1) == 1)


@dataclass(frozen=True)
class FirstErrorFocal(Term):
    """L_focal = mean of -log q_{j*}(y_{j*}) over the blocks that have an error; 0 if none has.

    Source: method.md, "The three interventions", 2. Which slot is j* is not differentiated.

    A label outside a reduced draft vocabulary is an error that nothing mends: where it is the
    first, the block is counted and adds 0, for no later error of it is ever reached.

    Args:
        modulation: g >= 0; multiplies by (1 - q_{j*})^g, differentiated as in focal loss
            (arXiv 1708.02002). 0 is plain cross-entropy.
        positional_gamma: If given, multiplies by w_{j*} = exp(-(j*-1)/gamma). The mean stays one
            over blocks: the weights are not divided out.

    Raises:
        ValueError: modulation is negative or not finite, or positional_gamma is not positive.
    """

    modulation: float = 0.0
    positional_gamma: float | None = None

    def __post_init__(self) -> None:
        if not (self.modulation >= 0 and math.isfinite(self.modulation)):
            raise ValueError(
                f"The focal modulation is {self.modulation}; give an exponent of 0 or more."
            )
        if self.positional_gamma is not None:
            check_gamma(self.positional_gamma)

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the sum over first errors, and how many blocks have one."""
        first_MN = first_errors(scores)
        has_error_M = first_MN.any(dim=1)
        log_prob_M = torch.where(first_MN, scores.reachable_log_prob, 0.0).sum(dim=1)
        loss_M = -log_prob_M
        if self.modulation != 0:
            # blocks that teach nothing would have 1 - q = 0, whose power has no finite slope; at an
            # error q is at most 1/2, since another token has at least as much
            teaches_M = (first_MN & scores.reachable).any(dim=1)
            safe_M = torch.where(teaches_M, log_prob_M, -1.0)
            loss_M = loss_M * (-torch.expm1(safe_M)).pow(self.modulation)
        if self.positional_gamma is not None:
            weights_N = positional_weights(self.positional_gamma, scores.log_prob)
            loss_M = loss_M * (first_MN * weights_N).sum(dim=1)
        return Ratio(loss_M.sum(), has_error_M.sum().to(loss_M.dtype))

    def window_denominator(self, counts_N: Tensor) -> None:
        """Returns None: which blocks have an error depends on predictions."""
        return None
