"""Distillation: the divergence from the target's whole distribution, not of its token alone.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from losses.positional import PositionalMean
from losses.scores import BlockScores


@dataclass(frozen=True)
class ForwardKL(PositionalMean):
    """L = sum w_k valid_k KL(p_k || q_k) / sum w_k valid_k, w_k = exp(-(k-1)/gamma).

    p_k is the target's distribution (temperature 1) of the token at slot k given the response's own
    tokens before it. Its gradient is that of cross-entropy with p_k for a label, so a slot teaches
    all tokens that the target thinks likely. Source: Hinton et al., arXiv 1503.02531; for drafters
    DistillSpec, arXiv 2310.08461; positional weights as in `PositionalCrossEntropy`. With a reduced
    draft vocabulary, whose q cannot cover p, p_k is renormalised over the kept tokens.

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

    @property
    def reads(self) -> frozenset[str]:
        """KL(p || q) alone."""
        return frozenset({"kl"})

    def cost(self, scores: BlockScores) -> Tensor:
        """Returns KL(p || q) (M, N)."""
        return scores.of_target("kl")
