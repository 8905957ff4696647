from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class BlockScores:
    log_prob: Tensor
    correct: Tensor
    valid: Tensor
    overlap: Tensor | None = None
    kl: Tensor | None = None
    confidence: Tensor | None = None
