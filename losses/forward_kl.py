"""Distillation: the divergence from the target's whole distribution, not of its token alone.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from losses.positional import check_gamma, positional_weights
from losses.ratio import Ratio, Term
from losses.scores import BlockScores


@dataclass(frozen=True)
class ForwardKL(Term):
    """L = sum w_k valid_k KL(p_k || q_k) / sum w_k valid_k, w_k = exp(-(k-1)/gamma).

    p_k is the target's distribution (temperature 1) of the token at slot k given the response's own
    tokens before it. Its gradient is that of cross-entropy with p_k for a label, so a slot teaches
    all tokens that the target thinks likely. Source: Hinton et al., arXiv 1503.02531; for drafters
    DistillSpec, arXiv 2310.08461; positional weights as in `PositionalCrossEntropy`.

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.

    Raises:
        ValueError: gamma is not positive; or, when called, the scores have no `kl`.

    Example:
        >>> import torch
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> scores = BlockScores(torch.zeros(1, 2), mask, mask, kl=torch.tensor([[0.5, 0.1]]))
        >>> ForwardKL(gamma=float("inf"))(scores).value
        tensor(0.3000)
    """

    gamma: float = 10.0
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_gamma(self.gamma)

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the weighted sum over valid slots, and the sum of their weights."""
        counts_N = scores.counts_N.to(scores.log_prob.dtype)
        weights_N = positional_weights(self.gamma, counts_N)
        numerator = (scores.valid_kl * weights_N).sum()
        return Ratio(numerator, self.window_denominator(counts_N))

    def window_denominator(self, counts_N: Tensor) -> Tensor:
        """Returns sum_k w_k counts_k, 0-d."""
        return (positional_weights(self.gamma, counts_N) * counts_N).sum()
