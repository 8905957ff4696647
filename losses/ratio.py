"""Sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """A term as numerator over denominator, both 0-d."""

    numerator: Tensor
    denominator: Tensor

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)

    @property
    def value(self) -> Tensor:
        safe = torch.where(self.denominator > 0, self.denominator, 1.0)
        return torch.where(self.denominator > 0, self.numerator / safe, 0.0 * self.numerator)

    def detach(self) -> Ratio:
        return Ratio(self.numerator.detach(), self.denominator.detach())
