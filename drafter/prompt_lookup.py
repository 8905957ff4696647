"""Prompt lookup: drafts copied from where the newest tokens stood before. The baseline to beat.

The longest n-gram at the end of the context that occurs earlier in it is looked up, its latest
occurrence first; what followed it there is the draft. No model, so a round costs the target only.

Legend: n drafted tokens, N most of them, V vocabulary.
Source: "prompt lookup decoding" (Saxena 2023), as transformers' `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drafter.decoding import CachedTarget

LONGEST_NGRAM = 3


def look_up(tokens: Sequence[int], most: int, longest: int = LONGEST_NGRAM) -> list[int]:
    """Returns up to `most` tokens that followed the latest earlier copy of the context's end.

    Args:
        tokens: The context, newest last.
        most: N.
        longest: Longest n-gram to look for; shorter ones are tried after it.

    Example:
        >>> look_up([5, 6, 7, 8, 5, 6], most=3)
        [7, 8, 5]
        >>> look_up([1, 2, 3], most=3)
        []
    """
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        end = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == end:
                return list(tokens[start + length : start + length + most])
    return []


class PromptLookup:
    """`DrafterEngine` without a model.

    Args:
        engine: The target's side of the same prompt.
        block_size: K; at most K-1 tokens are drafted.
        vocab_size: V.
        device: Of the logits.
    """

    def __init__(
        self, engine: CachedTarget, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self._engine = engine
        self.block_size = block_size
        self._vocab_size = vocab_size
        self._device = device

    def draft(self, anchor_id: int) -> Tensor:
        """See `DrafterEngine`; logits that leave no choice, at any temperature."""
        found = look_up([*self._engine.committed, anchor_id], self.block_size - 1)
        logits_nV = torch.full((len(found), self._vocab_size), -math.inf, device=self._device)
        index = torch.tensor(found, dtype=torch.long, device=self._device)
        return logits_nV.scatter_(-1, index.view(-1, 1), 0.0)
