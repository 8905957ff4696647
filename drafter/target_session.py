"""Decoding one prompt with the target: a cache of keys and values that can be cut back.

Legend: n tokens appended, L tapped layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from drafter.target import Target
    from drafter.target_masks import AttentionMasks


@contextmanager
def frozen(device: torch.device) -> Iterator[None]:
    """Nothing is recorded for a backward pass, and autocast leaves the target's dtype alone.

    Lightning validates in inference mode; tensors made there could never be used in training, so
    that is lifted too.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


class TargetSession:
    """Keys and values of one prompt and what follows it.

    Every layer keeps the whole context, sliding-window ones too (the mask still slides): so a crop
    after a rejected draft can't have lost what it needs.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cache = DynamicCache()  # made without a config: no layer drops old tokens
        self.length = 0
        """Tokens held."""

    def forward(self, ids: Tensor, layer_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Appends tokens.

        Args:
            ids: (n,) int64.
            layer_ids: Tapped layers, L.

        Returns:
            (n, D) states after the final norm, (n, L*D) tapped states.
        """
        positions = torch.arange(self.length, self.length + len(ids), device=ids.device)
        last, taps = self._target.run(
            layer_ids,
            self._cache,
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
        )
        self.length += len(ids)
        return last[0], taps[0]

    def forward_tree(
        self,
        ids: Tensor,
        depths: Tensor,
        seen: Tensor,
        layer_ids: Sequence[int],
        masks: AttentionMasks,
    ) -> tuple[Tensor, Tensor]:
        """Appends a tree of tokens: each sees what is held, and its own ancestors.

        Args:
            ids: (n,) int64.
            depths: (n,) int64, tokens from the first one's place, 0 for that.
            seen: (n, n) bool, which of them each one sees (itself and its ancestors).
            layer_ids: Tapped layers, L.
            masks: The target's (`Target.tree_masks`).

        Returns:
            As `forward`. `keep` must come next: places in the cache are not positions.
        """
        held = torch.arange(self.length, device=ids.device)
        positions = self.length + depths
        places = torch.cat((held, positions))
        visible = torch.cat((seen.new_ones(len(ids), self.length), seen), 1)
        last, taps = self._target.run(
            layer_ids,
            self._cache,
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            # a 4-d mask is taken as it is
            attention_mask=masks.of(visible[None, None], positions[:, None] - places),
        )
        self.length += len(ids)
        return last[0], taps[0]

    def keep(self, held: int, places: Tensor) -> None:
        """Keeps the first `held` tokens, and of the others those at `places` (m,) behind them."""
        length = held + len(places)
        for layer in self._cache.layers:
            for states in (layer.keys, layer.values):  # what is held stays where it is
                states[:, :, held:length] = states.index_select(2, held + places)
        self.crop(length)

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        assert 0 < length <= self.length
        if length < self.length:
            # a positive argument means something else in each version of transformers
            self._cache.crop(length - self.length)
            self.length = length
