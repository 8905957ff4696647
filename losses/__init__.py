"""Losses of a block-diffusion drafter: functions of BlockScores and nothing else.

Every term is a `Ratio` (numerator, denominator), so that one definition serves the loss, the
logged values, several ranks and gradient accumulation. `CombinedLoss` adds the terms up. Nothing
here reads a tensor's value on the host, except the prefix check of `BlockScores` on a CPU.
"""

from losses.accept_until_fail import AcceptUntilFail
from losses.chain import Chain
from losses.combined import CombinedLoss, LossOutput, WeightedTerm
from losses.confidence import Confidence
from losses.dpace import DPace
from losses.first_error import FirstErrorFocal
from losses.forward_kl import ForwardKL
from losses.overlap import Overlap
from losses.positional import PositionalCrossEntropy
from losses.ratio import Ratio, Term
from losses.reverse_kl import ReverseKL
from losses.schedule import Schedule
from losses.scores import BlockScores

__all__ = [
    "AcceptUntilFail",
    "BlockScores",
    "Chain",
    "CombinedLoss",
    "Confidence",
    "DPace",
    "FirstErrorFocal",
    "ForwardKL",
    "LossOutput",
    "Overlap",
    "PositionalCrossEntropy",
    "Ratio",
    "ReverseKL",
    "Schedule",
    "Term",
    "WeightedTerm",
]
