"""Accept-until-fail, a rival objective: slots behind the first error teach nothing.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from losses.first_error import first_errors
from losses.ratio import Ratio, Term
from losses.scores import BlockScores


@dataclass(frozen=True)
class AcceptUntilFail(Term):
    """Mean of -log q_k(y_k) over the valid slots k <= j*, j* the first error; all if there is none.

    Which slot is j* is not differentiated. Source: arXiv 2607.01893; method.md, "Rival objectives".
    A label outside a reduced draft vocabulary ends a block as any error does, and adds 0.

    Example:
        >>> log_prob = torch.tensor([[0.5, 0.25, 0.125]]).log()
        >>> correct = torch.tensor([[True, False, True]])
        >>> scores = BlockScores(log_prob, correct, torch.ones_like(correct))
        >>> AcceptUntilFail()(scores).value  # (ln 2 + ln 4) / 2
        tensor(1.0397)
    """

    def __call__(self, scores: BlockScores) -> Ratio:
        """Returns the sum over slots up to the first error, and how many they are."""
        first_MN = first_errors(scores)
        behind_MN = first_MN.cumsum(dim=1) - first_MN.long() > 0
        taught_MN = scores.valid & ~behind_MN
        numerator = -torch.where(taught_MN, scores.reachable_log_prob, 0.0).sum()
        return Ratio(numerator, taught_MN.sum().to(numerator.dtype))

    def window_denominator(self, counts_N: object) -> None:
        """Returns None: how many slots come before an error depends on predictions."""
        return None
