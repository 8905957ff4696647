"""D-PACE, a rival objective: cross-entropy weighted by what each slot adds to the match length.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.ratio import Ratio, Term
from losses.scores import BlockScores

Part = Literal["both", "prefix", "continuation"]


@dataclass(frozen=True)
class DPace(Term):
    """L = mean over blocks with a valid slot of sum_{valid j} w_j (-log q_j(y_j)), w detached.

    With q~_i = (1 - smoothing) q_i(y_i) + smoothing, the weight is w_j = sum_{m >= j} P_m over
    valid m, P_m = prod_{i <= m} q~_i: how likely slots 1..j are to be accepted, times how many more
    follow. Unsmoothed its gradient is that of the chain term times -N.
    Source: arXiv 2605.18810; method.md, "Rival objectives".

    A label outside a reduced draft vocabulary has q = 0, so q~ is the smoothing alone, and adds 0
    to the sum.

    Args:
        smoothing: 0 to 1 (the paper's 0.5); at 1 the weight is the number of valid slots from j on.
        part: `both`, or an ablation of the paper: `prefix` alone, w_j = P_j, or `continuation`
            alone, w_j = sum_{m >= j} P_m / P_j.

    Raises:
        ValueError: smoothing outside 0 to 1, or another part.

    Example:
        >>> half = torch.full((1, 2), 0.5).log()
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> DPace(smoothing=0.0)(BlockScores(half, mask, mask)).value  # (3/4 + 1/4) ln 2
        tensor(0.6931)
    """

    smoothing: float = 0.5
    part: Part = "both"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"D-PACE's smoothing is {self.smoothing}; give a number from 0 to 1.")
        if self.part not in ("both", "prefix", "continuation"):
            raise ValueError(
                f"D-PACE's part is {self.part!r}; choose 'both', 'prefix' or 'continuation'."
            )

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the weighted sum over valid slots, and how many blocks have one."""
        numerator = -(self.weights(scores) * scores.reachable_log_prob).sum()
        return Ratio(numerator, scores.valid[:, 0].sum().to(numerator.dtype))

    @torch.no_grad()
    def weights(self, scores: BlockScores) -> Tensor:
        """Returns w (M, N), 0 at invalid slots."""
        # log space: products would underflow, and one is divided by another
        log_prob = scores.log_prob
        if scores.outside is not None:
            # q = 0, so small that products vanish, and divide all the same
            least = math.log(torch.finfo(log_prob.dtype).tiny)
            log_prob = torch.where(scores.outside, least, log_prob)
        floor = torch.full_like(log_prob, _log(self.smoothing))
        smooth_MN = torch.logaddexp(log_prob + _log(1 - self.smoothing), floor)
        prefix_MN = torch.where(scores.valid, smooth_MN, 0.0).cumsum(dim=1)
        if self.part == "prefix":
            return torch.where(scores.valid, prefix_MN.exp(), 0.0)
        least = torch.finfo(prefix_MN.dtype).min
        logs_MN = torch.where(scores.valid, prefix_MN, least).flip(1)
        from_here_MN = logs_MN.logcumsumexp(dim=1).flip(1)
        if self.part == "continuation":
            from_here_MN = from_here_MN - prefix_MN
        return torch.where(scores.valid, from_here_MN.exp(), 0.0)

    def window_denominator(self, counts_N: Tensor) -> Tensor:
        """Returns the number of blocks with a valid slot, 0-d."""
        return counts_N[0]


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
