"""The chain term, the third of the three interventions.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.ratio import Ratio, Term
from losses.scores import BlockScores

Normalize = Literal["block", "valid", "none"]


@dataclass(frozen=True)
class Chain(Term):
    """R = mean over blocks with a valid slot of (1/N) sum_{valid k} prod_{j<=k} q_j(y_j).

    N R is the expected match length of a draft sampled from q, so R is to be maximised: the total
    subtracts it. Its gradient, dR/dlog q_j = (1/N) sum_{k>=j} prod_{i<=k} q_i, is D-PACE's
    unsmoothed weights (arXiv 2605.18810) over N. Source: method.md, "The three interventions", 3.
    Behind a label outside a reduced draft vocabulary, where q is 0, every product is exactly 0.

    Args:
        normalize: What a block's sum is divided by: `block` is N for partial blocks too (the
            paper's), `valid` the block's own number of valid slots, `none` leaves the expected
            match length itself, which streak distillation maximises (arXiv 2511.00606, on
            responses of the target).

    Raises:
        ValueError: normalize is none of these.

    Example:
        >>> half = torch.full((1, 2), 0.5).log()
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> Chain()(BlockScores(half, mask, mask)).value  # (1/2 + 1/4) / 2
        tensor(0.3750)
    """

    normalize: Normalize = "block"

    def __post_init__(self) -> None:
        if self.normalize not in ("block", "valid", "none"):
            raise ValueError(
                f"The chain is normalised by {self.normalize!r}; choose 'block', 'valid' or 'none'."
            )

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the blocks' sum, normalised, and how many blocks have a valid slot."""
        prefix_MN = scores.valid_log_prob.cumsum(dim=1)  # log space: products would underflow
        match_M = torch.where(scores.valid, prefix_MN.exp(), 0.0).sum(dim=1)
        if self.normalize == "valid":
            numerator = (match_M / scores.valid.sum(dim=1).clamp(min=1)).sum()
        else:
            slots = scores.valid.shape[1] if self.normalize == "block" else 1
            numerator = match_M.sum() / slots
        return Ratio(numerator, scores.valid[:, 0].sum().to(numerator.dtype))

    def window_denominator(self, counts_N: Tensor) -> Tensor:
        """Returns the number of blocks with a valid slot, 0-d."""
        return counts_N[0]
