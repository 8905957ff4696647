"""The loss of a drafter's confidence head, and how well what it says is calibrated.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.overlap import check_temperature
from losses.positional import PositionalMean
from losses.ratio import Ratio
from losses.scores import CONFIDENCE, BlockScores


@dataclass(frozen=True)
class Confidence(PositionalMean):
    """sum w_k valid_k BCE(c_k, a_k) / sum w_k valid_k, a_k = sum_v min(p_k(v), q_k(v)) held fixed.

    c_k is the confidence head's chance, and BCE(c, a) = -a log c - (1 - a) log(1 - c), least at
    c = a, the probability that rejection sampling accepts slot k once it is reached. Nothing flows
    back through a; what flows through the head's state is the module's choice.
    Source: DSpark (arXiv 2607.05147) and its public code, where it stands at weight 1 beside 0.1
    times cross-entropy and 0.9 times the L1 distance, which is 2 (1 - a): 1.8 times `Overlap`.

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.
        temperature: Of both models' distributions, above 0.

    Raises:
        ValueError: A setting out of range; or, when called, the scores lack what it reads.

    Example:
        >>> mask, half = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 0.5)
        >>> scores = BlockScores(0 * half, mask, mask, overlap=half, confidence=0 * half)
        >>> Confidence()(scores).value  # log 2
        tensor(0.6931)
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    @property
    def reads(self) -> frozenset[str]:
        """The overlap and the head's logits."""
        return frozenset({"overlap", CONFIDENCE})

    def cost(self, scores: BlockScores) -> Tensor:
        """Returns BCE(c, a) (M, N)."""
        if scores.confidence is None:
            raise ValueError(
                "BlockScores.confidence is missing, which losses.Confidence trains; give the "
                "drafter a confidence head (model.confidence_head)."
            )
        overlap = scores.of_target("overlap").detach()
        cost = F.binary_cross_entropy_with_logits(scores.confidence, overlap, reduction="none")
        return torch.where(scores.valid, cost, 0.0)


@torch.no_grad()
def calibration(scores: BlockScores) -> dict[str, Ratio]:
    """Returns figures over all valid slots, by name; none where the scores lack what they need.

    `confidence_brier` is the expected Brier score, the mean of (c - a)^2 + a (1 - a): of a forecast
    c of what happens with probability a. `confidence_bias` is the mean of c - a.

    Args:
        scores: With the confidence head's logits and the overlap.

    Example:
        >>> mask, half = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 0.5)
        >>> scores = BlockScores(0 * half, mask, mask, overlap=half, confidence=0 * half)
        >>> {name: ratio.value.item() for name, ratio in calibration(scores).items()}
        {'confidence_brier': 0.25, 'confidence_bias': 0.0}
    """
    if scores.confidence is None or scores.overlap is None:
        return {}
    chance, accepted = scores.confidence.sigmoid(), scores.overlap
    slots = scores.valid.sum().to(chance.dtype)

    def mean(value: Tensor) -> Ratio:
        return Ratio(torch.where(scores.valid, value, 0.0).sum(), slots)

    apart = chance - accepted
    return {
        "confidence_brier": mean(apart.square() + accepted * (1 - accepted)),
        "confidence_bias": mean(apart),
    }
