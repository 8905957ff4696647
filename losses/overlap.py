"""Overlap losses: the probability that sampled speculative decoding accepts, aimed at directly.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.positional import PositionalMean
from losses.scores import BlockScores

Form = Literal["linear", "log", "blend"]


@dataclass(frozen=True)
class Overlap(PositionalMean):
    """sum w_k valid_k c(a_k) / sum w_k valid_k of the overlap a_k = sum_v min(p_k(v), q_k(v)).

    a_k is one minus the total variation distance, and the probability that rejection sampling
    accepts slot k (method.md, "Exact verification"). The cost is 1 - a (`linear`), -log a (`log`),
    or l KL(p || q) + (1 - l)(1 - a) with l = exp(-decay a) held fixed (`blend`): KL where the two
    hardly meet, since 1 - a has next to no gradient there. At a point mass p = 1[y] the overlap is
    q(y), and `log` is cross-entropy. Where a underflows, as it may at temperatures far below 1,
    `log` has no gradient. With a reduced draft vocabulary the sum is over the kept tokens, and p
    over all: what p has outside is never accepted. (The blend's KL is `ForwardKL`'s.)
    Source: arXiv 2602.23881; method.md, "Rival objectives".

    Args:
        gamma: Positions over which the weight falls by a factor of e; inf for uniform.
        form: See above.
        temperature: Of both models' distributions, above 0. The blend takes 1 only, KL's.
        decay: The blend's, 0 or more; 0 leaves KL alone.

    Raises:
        ValueError: A setting out of range; or, when called, the scores lack what it reads.

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> scores = BlockScores(torch.zeros(1, 2), mask, mask, overlap=torch.tensor([[0.5, 0.9]]))
        >>> Overlap(gamma=float("inf"))(scores).value
        tensor(0.3000)
    """

    form: Form = "linear"
    temperature: float = 1.0
    decay: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        if self.form not in ("linear", "log", "blend"):
            raise ValueError(f"Overlap's form is {self.form!r}; choose 'linear', 'log' or 'blend'.")
        if not self.decay >= 0:
            raise ValueError(f"Overlap's decay is {self.decay}; give 0 or more.")
        if self.form == "blend" and self.temperature != 1:
            raise ValueError(
                f"Overlap's temperature is {self.temperature}, but the blend's KL is at 1: leave "
                "it at 1, or choose another form."
            )

    @property
    def reads(self) -> frozenset[str]:
        """The overlap, and KL(p || q) for the blend."""
        return frozenset({"overlap", "kl"} if self.form == "blend" else {"overlap"})

    def cost(self, scores: BlockScores) -> Tensor:
        """Returns c (M, N)."""
        overlap = scores.of_target("overlap")
        if self.form == "log":
            least = torch.finfo(overlap.dtype).tiny  # no token in common, to the last bit
            return -torch.where(scores.valid, overlap, 1.0).clamp(min=least).log()
        apart = torch.where(scores.valid, 1 - overlap, 0.0)
        if self.form == "linear":
            return apart
        share = torch.exp(-self.decay * overlap.detach())
        return share * scores.of_target("kl") + (1 - share) * apart


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"The temperature of a loss is {temperature}; give a positive number.")
