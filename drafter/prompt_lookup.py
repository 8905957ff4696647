"""Prompt lookup: drafts copied from where the newest tokens stood before. The baseline to beat.

The longest n-gram at the end of the context that occurs earlier in it is looked up: its latest
occurrence with a whole draft behind it, or else the one with most behind it. What followed it there
is the draft. No model, so a round costs the target only.

Legend: n drafted tokens, N most of them, V vocabulary.
Source: "prompt lookup decoding" (Saxena 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from drafter.decoding import CachedTarget

LONGEST_NGRAM = 3


class NGramIndex:
    """Where every n-gram of a growing context ends, so that a look-up does not scan it.

    Args:
        longest: Longest n-gram to look for; shorter ones are tried after it.
    """

    def __init__(self, longest: int = LONGEST_NGRAM) -> None:
        self.tokens: list[int] = []
        self._longest = longest
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the context."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for length in range(1, min(self._longest, end) + 1):
                self._ends.setdefault(tuple(self.tokens[end - length :]), []).append(end)

    def look_up(self, most: int) -> list[int]:
        """Returns up to `most` tokens that followed an earlier copy of the context's end.

        Example:
            >>> index = NGramIndex()
            >>> index.extend([5, 6, 7, 8, 5, 6])
            >>> index.look_up(most=3)
            [7, 8, 5]
            >>> index.extend([1])
            >>> index.look_up(most=3)
            []
        """
        size = len(self.tokens)
        for length in range(min(self._longest, size - 1), 0, -1):
            newest = tuple(self.tokens[size - length :])
            ends = self._ends[newest][:-1]  # the last of them is the context's own end
            if not ends:
                continue
            whole = next((end for end in reversed(ends) if end + most <= size), ends[0])
            return self.tokens[whole : whole + most]
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
        self._index = NGramIndex()

    def draft(self, anchor_id: int) -> Tensor:
        """See `DrafterEngine`; logits that leave no choice, at any temperature."""
        known = len(self._index.tokens)
        self._index.extend([*self._engine.committed, anchor_id][known:])
        found = self._index.look_up(self.block_size - 1)
        logits_nV = torch.full((len(found), self._vocab_size), -math.inf, device=self._device)
        index = torch.tensor(found, dtype=torch.long, device=self._device)
        return logits_nV.scatter_(-1, index.view(-1, 1), 0.0)
