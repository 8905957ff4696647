"""Sums that add up over micro-batches and ranks, and what a loss term is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.scores import BlockScores


@dataclass(frozen=True, eq=False)
class Ratio:
    """A mean before its division (method.md, "Reductions"): sums add up, means do not.

    Args:
        numerator: 0-d, in the scores' dtype.
        denominator: 0-d, the same dtype; never negative, carries no gradient.

    Example:
        >>> small = Ratio(torch.tensor(2.0), torch.tensor(1.0))
        >>> large = Ratio(torch.tensor(4.0), torch.tensor(3.0))
        >>> (small + large).value
        tensor(1.5000)
    """

    numerator: Tensor
    denominator: Tensor

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)

    @property
    def value(self) -> Tensor:
        """0-d, the quotient; 0 where the denominator is 0, without a NaN in the gradient."""
        some = self.denominator > 0
        return torch.where(some, self.numerator / torch.where(some, self.denominator, 1.0), 0.0)

    def detach(self) -> Ratio:
        """Returns the same numbers without a graph."""
        return Ratio(self.numerator.detach(), self.denominator.detach())


class Term(ABC):
    """A loss term over one micro-batch of blocks."""

    temperature: float = 1.0
    """Of the distributions of both models that it reads, if it reads any."""

    @property
    def reads(self) -> frozenset[str]:
        """Which of `TARGET_SCORES` and `CONFIDENCE` it reads; none if labels are enough."""
        return frozenset()

    @abstractmethod
    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the term's sum and what it is divided by."""

    @abstractmethod
    def window_denominator(self, counts_N: Tensor) -> Tensor | None:
        """Returns the denominator over a whole accumulation window, if labels alone decide it.

        Args:
            counts_N: (N,) valid slots at each position over the window and all ranks.

        Returns:
            0-d in the dtype of floating `counts_N`, or None if it depends on predictions.
        """
