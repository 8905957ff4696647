"""A reduced draft vocabulary: the tokens that a drafter drafts from, where they are not all.

Legend: V vocabulary of the target, R tokens of it that are kept, D hidden size.

The target's head has a row for every token, and scoring and drafting are products with all of them.
A drafter that drafts from R tokens needs R rows. What is left out has q = 0: it is never drafted,
and a label outside is wrong whatever the drafter does. Verification is the target's and knows
nothing of it, so the text stays exact.

Ids outside `ReducedHead` and the file layout below are always the target's own. The kept ones
ascend, so draft id r stands for the r-th of them, and ties between draft ids break as those between
token ids do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from drafter.errors import UserError

if TYPE_CHECKING:
    from drafter.head import FrozenHead


@dataclass(frozen=True, eq=False)
class ReducedHead:
    """The rows of a target's head that stand for the kept tokens.

    Args:
        whole: The target's head, V rows.
        rows: Its rows of the kept tokens, R of them.
        kept: (R,) int64, ascending token ids.
        draft_ids: (V,) int64, each token's place in `kept`, -1 outside.
    """

    whole: FrozenHead
    rows: FrozenHead
    kept: Tensor
    draft_ids: Tensor

    @classmethod
    def of(cls, whole: FrozenHead, kept: Tensor) -> ReducedHead:
        """Returns the part of a head that `kept` (R,) names; its rows are a copy."""
        kept = kept.to(whole.weight.device)
        bias = None if whole.bias is None else whole.bias[kept]
        rows = dataclasses.replace(whole, weight=whole.weight[kept], bias=bias)
        draft_ids = torch.full((whole.vocab_size,), -1, device=kept.device)
        draft_ids[kept] = torch.arange(len(kept), device=kept.device)
        return cls(whole, rows, kept, draft_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V) of states (..., D), as `FrozenHead`: -inf outside.

        All that follows (argmax, warps, drawing, trees) then reads token ids, with q = 0 outside.
        """
        logits = self.rows.logits(hidden)
        out = logits.new_full((*logits.shape[:-1], self.whole.vocab_size), -torch.inf)
        return out.index_copy_(-1, self.kept, logits)

    def chunk_rows(self, whole: bool = False) -> int:
        """Returns how many slots' logits over all V tokens are held at once; see `FrozenHead`."""
        return self.whole.chunk_rows(whole)


def check_draft_vocab_size(size: int, vocab_size: int) -> None:
    """Raises UserError unless 1 <= R <= V."""
    if not 1 <= size <= vocab_size:
        raise UserError(
            f"--model.draft_vocab_size is {size}, of the target's {vocab_size} tokens; give 1 to "
            f"{vocab_size}, or leave it out to draft from all."
        )


def most_frequent(counts: np.ndarray, size: int) -> Tensor:
    """Returns the `size` most frequent tokens, ascending int64 ids; of equal ones the lowest.

    Args:
        counts: (V,) how often each token is supervised.
        size: R.

    Example:
        >>> most_frequent(np.array([0, 5, 0, 2, 2]), 3).tolist(), most_frequent(np.zeros(4), 2)
        ([1, 3, 4], tensor([0, 1]))
    """
    by_count = np.argsort(-counts, kind="stable")  # equal counts stay in order of id
    return torch.from_numpy(np.sort(by_count[:size]).astype(np.int64))


def offsets(kept: Tensor) -> Tensor:
    """Returns `d2t` (R,) int64 of ascending ids: what a draft id lacks to its token id.

    So the speculators library, vLLM and SGLang have it: not the token id itself.

    Example:
        >>> offsets(torch.tensor([1, 4, 7]))
        tensor([1, 3, 5])
    """
    return kept - torch.arange(len(kept), device=kept.device)


def mask_of(kept: Tensor, vocab_size: int) -> Tensor:
    """Returns `t2d` (V,) bool, which tokens are kept."""
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, kept.cpu(), True)


def from_maps(d2t: Tensor, t2d: Tensor | None, size: int, vocab_size: int, where: str) -> Tensor:
    """Returns the kept tokens (R,) that a file's maps name.

    Args:
        d2t: (R,) integer offsets, as `offsets` gives.
        t2d: (V,) bool, or None where the file has none.
        size: R by the config.
        vocab_size: V.
        where: The file's folder, for messages.

    Raises:
        UserError: A map has another length than the config says, names a token twice or one that
            does not exist, or the two differ.
    """
    if d2t.shape != (size,) or d2t.is_floating_point():
        raise UserError(
            f"{where}: d2t is {d2t.dtype} of shape {tuple(d2t.shape)}, but its config.json has "
            f"draft_vocab_size {size}; export it anew."
        )
    kept = d2t.long() + torch.arange(size)
    ascends = bool((kept.diff() > 0).all())
    if not ascends or int(kept[0]) < 0 or int(kept[-1]) >= vocab_size:
        raise UserError(
            f"{where}: d2t (token id minus draft id) does not name {size} different tokens of "
            f"{vocab_size}, ascending; export it anew."
        )
    if t2d is not None and not torch.equal(t2d.bool(), mask_of(kept, vocab_size)):
        raise UserError(f"{where}: t2d and d2t name different tokens; export it anew.")
    return kept
