"""Distillation the other way round: the drafter pays for what the target would not write.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from losses.overlap import check_temperature
from losses.positional import PositionalMean
from losses.scores import BlockScores


@dataclass(frozen=True)
class ReverseKL(PositionalMean):
    """L = sum w_k valid_k KL(q_k || p_k) / sum w_k valid_k, w_k = exp(-(k-1)/gamma).

    Where `ForwardKL` spreads q over all that the target may write, this draws it to some of it. p_k
    is over all tokens with a reduced draft vocabulary too; q_k, and so the sum, over the kept ones.
    Source: DistillSpec, arXiv 2310.08461; Gu et al., arXiv 2306.08543.

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.
        temperature: Of both models' distributions, above 0.

    Raises:
        ValueError: A setting out of range; or, when called, the scores have no `reverse_kl`.

    Example:
        >>> import torch
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> kl = torch.tensor([[0.5, 0.1]])
        >>> scores = BlockScores(torch.zeros(1, 2), mask, mask, reverse_kl=kl)
        >>> ReverseKL(gamma=float("inf"))(scores).value
        tensor(0.3000)
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    @property
    def reads(self) -> frozenset[str]:
        """KL(q || p) alone."""
        return frozenset({"reverse_kl"})

    def cost(self, scores: BlockScores) -> Tensor:
        """Returns KL(q || p) (M, N)."""
        return scores.of_target("reverse_kl")
