"""Attention masks of our own for a target: what passes over fixed shapes and trees of drafts need.

Legend: n tokens run, S places in the cache; `...` leading dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drafter.errors import UserError

if TYPE_CHECKING:
    from drafter.target import Target

FULL, SLIDING = "full_attention", "sliding_attention"
CHECKED = 256
"""Tokens that a target's own cache is compared over."""


class AttentionMasks:
    """Makes finished masks in the form that a target takes in the place of a padding mask.

    Args:
        target: The frozen target.
        doing: What they are for, in the error: "The target X can't ...".
        remedy: What to do instead, likewise.
        also: Further reasons why it can't be done, and whether they apply.

    Raises:
        UserError: It has a kind of attention that is not known here, or can't take a mask.
    """

    def __init__(
        self, target: Target, doing: str, remedy: str, also: dict[str, bool] | None = None
    ) -> None:
        config = target.config
        attention = config._attn_implementation
        window = getattr(config, "sliding_window", None)
        kinds = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
        if not kinds:
            sliding = window is not None and getattr(config, "use_sliding_window", True)
            kinds = (SLIDING,) if sliding else (FULL,)
        reasons = {
            **(also or {}),
            f"its attention runs as {attention}; load it with sdpa": attention
            not in ("sdpa", "eager"),
            f"its layers are {', '.join(kinds)}": not set(kinds) <= {FULL, SLIDING},
            "it is spread over several GPUs": target.spread,
        }
        for reason, applies in reasons.items():
            if applies:
                raise UserError(f"The target {target.path} can't {doing}: {reason}. {remedy}.")
        self._kinds = kinds
        self.window = window if SLIDING in kinds else None
        self._dtype = target.dtype

    def of(self, seen: Tensor, distance: Tensor) -> Any:
        """Returns the masks.

        Args:
            seen: (..., n, S) bool, what each token may see where attention is full.
            distance: (..., n, S) int64, its position less that of the place; a sliding layer's
                window ends at it.
        """
        by_kind = {FULL: seen}
        if self.window is not None:
            by_kind[SLIDING] = seen & (distance < self.window)
        # what is added to the scores: SDPA would make it of a boolean mask in every layer
        zero = torch.zeros((), dtype=self._dtype, device=seen.device)
        low = torch.finfo(self._dtype).min
        masks = {kind: torch.where(mask, zero, low) for kind, mask in by_kind.items()}
        return masks if len(self._kinds) > 1 else masks[self._kinds[0]]


def same_states(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether states are the same but for the rounding of a target of this dtype."""
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return bool(error <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.05))


def checked_tree_masks(target: Target) -> AttentionMasks:
    """Returns the masks that trees of drafts are verified with, after a look at what they do.

    A tree of two branches is held to two passes over each branch alone, behind enough tokens to
    cross a sliding window's edge.

    Raises:
        UserError: The target's attention takes no such masks, or reads them in another way.
    """
    masks = AttentionMasks(target, "verify trees of drafts", "Leave --search out")
    known = max(1, min(target.max_length - 3, max(CHECKED, (masks.window or 0) + 3)))
    ids = torch.arange(known + 3, device=target.device) * 7 % target.vocab_size
    held, anchor, left, right = ids[:known], ids[-3:-2], ids[-2:-1], ids[-1:]
    session = target.session()
    session.forward(held, ())
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=ids.device)
    depths = torch.tensor([0, 1, 1], device=ids.device)
    ours, _ = session.forward_tree(ids[-3:], depths, seen, (), masks)
    for row, branch in ((1, left), (2, right)):
        alone = target.session()
        alone.forward(held, ())
        theirs, _ = alone.forward(torch.cat((anchor, branch)), ())
        if not same_states(ours[[0, row]], theirs, target.dtype):
            raise UserError(
                f"The target {target.path} ({type(target.model).__name__}) does not give the same "
                "states for a tree of drafts as for its branches; leave --search out."
            )
    return masks
