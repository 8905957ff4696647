"""BlockScores: all that a loss may see of a drafter's blocks.

Legend: M blocks (flattened), N drafted slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GAP = (
    "BlockScores.valid has a valid slot after an invalid one in its block, but validity must be a "
    "prefix (first-error and chain terms mean nothing otherwise); make it cumulative, as "
    "drafter.blocks.build_blocks does."
)

WHOLE_SCORES = ("overlap", "reverse_kl")
"""Fields of `BlockScores` that need all of the target's distribution (`drafter.whole_scores`)."""

TARGET_SCORES = ("kl", *WHOLE_SCORES)
"""Fields that need something of it: KL its mean rows of the head (`drafter.soft_labels`)."""

CONFIDENCE = "confidence"
"""The field that the drafter's confidence head fills."""


@dataclass(eq=False)
class BlockScores:
    """What the frozen head says of every drafted slot; column 0 is the slot after the anchor.

    Args:
        log_prob: (M, N) fp32 (fp64 for checks), log q_k(y_k) in nats; exactly 0 at invalid slots,
            -inf at `outside` ones.
        correct: (M, N) bool, whether argmax q_k is y_k; means nothing at invalid slots.
        valid: (M, N) bool, whether the slot is scored. Cumulative: slot k is valid only if all
            slots before it are (method.md, "Anchors, labels, validity").
        overlap: (M, N) like log_prob or None, sum_v min(p_k(v), q_k(v)).
        kl: (M, N) like log_prob or None, KL(p_k || q_k) in nats.
        reverse_kl: (M, N) like log_prob or None, KL(q_k || p_k) in nats.
        confidence: (M, N) like log_prob or None, the confidence head's logit of the chance that
            slot k is accepted once all before it are; 0 at invalid slots.
        outside: (M, N) bool or None, whether the slot is valid and y_k outside a reduced draft
            vocabulary: q_k(y_k) is 0 and no weight changes that. Such a slot is wrong, not
            skipped: it is valid, counted in every denominator, never correct, a block's first
            error if none is before it, and factor 0 of every product of q. Only -log q, which
            would be infinite, leaves it out (`reachable_log_prob`).

    Raises:
        ValueError: Shapes or dtypes differ from the above, or `valid` has a gap. On a GPU a gap is
            a device-side assertion instead, for the host does not wait for the answer.

    Example:
        >>> valid = torch.tensor([[True, True, False]])
        >>> scores = BlockScores(torch.zeros(1, 3), torch.ones_like(valid), valid)
        >>> scores.counts_N.tolist()
        [1, 1, 0]
    """

    log_prob: Tensor
    correct: Tensor
    valid: Tensor
    overlap: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    confidence: Tensor | None = None
    outside: Tensor | None = None

    def __post_init__(self) -> None:
        log_prob = self.log_prob
        if log_prob.ndim != 2 or log_prob.shape[1] < 1:
            raise ValueError(
                f"BlockScores.log_prob has shape {tuple(log_prob.shape)}; it must be (blocks, "
                "drafted slots) with at least one slot."
            )
        if log_prob.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"BlockScores.log_prob is {log_prob.dtype}; losses are computed in fp32, so "
                "convert the head's logits before the log-softmax."
            )
        for name in ("correct", "valid"):
            self._check_like_log_prob(name, getattr(self, name), torch.bool)
        for name in (*TARGET_SCORES, CONFIDENCE):
            optional = getattr(self, name)
            if optional is not None:
                self._check_like_log_prob(name, optional, log_prob.dtype)
        if self.outside is not None:
            self._check_like_log_prob("outside", self.outside, torch.bool)
        is_prefix = (self.valid[:, 1:] <= self.valid[:, :-1]).all()
        if self.valid.device.type == "cpu" and not torch.compiler.is_compiling():
            if not is_prefix:
                raise ValueError(_GAP)
        else:
            torch._assert_async(is_prefix, _GAP)

    def _check_like_log_prob(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.shape != self.log_prob.shape or tensor.dtype != dtype:
            raise ValueError(
                f"BlockScores.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be "
                f"{dtype} of log_prob's shape {tuple(self.log_prob.shape)}."
            )

    @property
    def valid_log_prob(self) -> Tensor:
        """(M, N), log_prob with 0 at invalid slots, which get exactly no gradient.

        It may be -inf (`outside`): for products of q.
        """
        return torch.where(self.valid, self.log_prob, 0.0)

    @property
    def reachable(self) -> Tensor:
        """(M, N) bool, valid slots whose label is in the draft vocabulary."""
        return self.valid if self.outside is None else self.valid & ~self.outside

    @property
    def reachable_log_prob(self) -> Tensor:
        """(M, N), log_prob with 0, and exactly no gradient, at all but `reachable` slots.

        For sums of log q.
        """
        return torch.where(self.reachable, self.log_prob, 0.0)

    def of_target(self, name: str) -> Tensor:
        """Returns one of `TARGET_SCORES` (M, N); invalid slots get exactly no gradient.

        Raises:
            ValueError: It is not there.
        """
        score: Tensor | None = getattr(self, name)
        if score is None:
            raise ValueError(
                f"BlockScores.{name} is missing, which a loss on the target's distribution reads; "
                "give score_blocks the target's soft labels (kl) or states."
            )
        return torch.where(self.valid, score, 0.0)

    @property
    def counts_N(self) -> Tensor:
        """(N,) int64, valid slots at each position; the first is the number of valid blocks."""
        return self.valid.sum(dim=0)
