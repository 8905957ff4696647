"""Positional cross-entropy, the first of the three interventions.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ratio import Ratio, Term
from losses.scores import BlockScores


def positional_weights(gamma: float, like: Tensor) -> Tensor:
    """Returns w_k = exp(-(k-1)/gamma) for k = 1..N, (N,).

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf gives exact ones.
        like: (..., N), whose device and floating dtype the weights take (fp32 if it has none).

    Example:
        >>> positional_weights(4.0, torch.zeros(3))
        tensor([1.0000, 0.7788, 0.6065])
    """
    dtype = like.dtype if like.is_floating_point() else torch.float32
    slots_N = torch.arange(like.shape[-1], dtype=dtype, device=like.device)
    return torch.exp(-slots_N / gamma)


def check_gamma(gamma: float) -> None:
    """Raises ValueError unless gamma is positive (inf included)."""
    if not gamma > 0:  # refuses NaN too
        raise ValueError(
            f"gamma is {gamma}; give a positive number of positions, or .inf for uniform weights."
        )


@dataclass(frozen=True)
class PositionalMean(Term):
    """sum w_k valid_k c_k / sum w_k valid_k of a cost c a slot, w_k = exp(-(k-1)/gamma).

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.

    Raises:
        ValueError: gamma is not positive.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        check_gamma(self.gamma)

    @abstractmethod
    def cost(self, scores: BlockScores) -> Tensor:
        """Returns c (M, N), 0 at invalid slots."""

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the weighted sum over valid slots, and the sum of their weights."""
        counts_N = scores.counts_N.to(scores.log_prob.dtype)
        weights_N = positional_weights(self.gamma, counts_N)
        numerator = (self.cost(scores) * weights_N).sum()
        return Ratio(numerator, self.window_denominator(counts_N))

    def window_denominator(self, counts_N: Tensor) -> Tensor:
        """Returns sum_k w_k counts_k, 0-d."""
        return (positional_weights(self.gamma, counts_N) * counts_N).sum()


@dataclass(frozen=True)
class PositionalCrossEntropy(PositionalMean):
    """L_ce = sum w_k valid_k (-log q_k(y_k)) / sum w_k valid_k, w_k = exp(-(k-1)/gamma).

    Source: method.md, "The three interventions", 1; gamma = 10 in the paper, DFlash 7 at K = 16.

    A label outside a reduced draft vocabulary adds nothing to the numerator, where it would be
    infinite, and its weight to the denominator: what is in reach is taught as hard as without it.
    So the value falls as labels fall outside, and compares only between equal vocabularies.

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.

    Raises:
        ValueError: gamma is not positive.
    """

    def cost(self, scores: BlockScores) -> Tensor:
        """Returns -log q(y) (M, N); 0 where the label is out of reach."""
        return -scores.reachable_log_prob
