"""The target on fixed shapes and addresses: what CUDA graphs of decoding are recorded from.

Legend: B rows, n tokens run, S places in the cache, G key/value heads, E head size, L tapped
layers, D hidden size.

transformers calls a cache's `update` in every attention layer; here it writes keys and values to
places that a tensor on the device names, and gives the whole buffers back. What may be seen of them
is said by masks of our own, so nothing depends on a number that only the host knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from drafter.errors import UserError
from drafter.target import Target
from drafter.target_masks import CHECKED, AttentionMasks, same_states

HOST_ROPE = ("dynamic", "longrope")  # their angles depend on a length that they ask the host for
CHECKED_BLOCK = 4
"""Tokens of the pass behind the CHECKED ones."""


class _Places:
    """Where the tokens of a pass go; shared by all layers."""

    rows: slice
    index_Bn: Tensor


class _StaticLayer(CacheLayerMixin):
    """Keys and values (B, G, S, E) of one layer."""

    is_compileable = True

    def __init__(self, places: _Places, rows: int, length: int) -> None:
        super().__init__()
        self._places = places
        self._shape = (rows, length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers; zeros, since what is hidden is still multiplied by 0."""
        rows, length = self._shape
        for name, states in (("keys", key_states), ("values", value_states)):
            heads, size = states.shape[1], states.shape[3]
            setattr(self, name, states.new_zeros(rows, heads, length, size))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes (rows, G, n, E) where `places` say; returns those rows' whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[self._places.rows], self.values[self._places.rows]
        write(keys, key_states, self._places.index_Bn)
        write(values, value_states, self._places.index_Bn)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first of them; ours are made elsewhere."""
        return self._shape[1], 0

    def get_seq_length(self) -> int:
        """Not known on the host; positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """S."""
        return self._shape[1]

    get_max_cache_shape = get_max_length  # its name before transformers 5.16


def write(buffer_BGSE: Tensor, states_BGnE: Tensor, index_Bn: Tensor) -> None:
    """Writes states to places of a buffer, in place."""
    index_BGnE = index_Bn[:, None, :, None].expand(states_BGnE.shape)
    buffer_BGSE.scatter_(2, index_BGnE, states_BGnE.to(buffer_BGSE.dtype))


class StaticTarget:
    """A target whose passes read and write fixed addresses.

    Args:
        target: The frozen target.
        layer_ids: Tapped layers, L; may be empty.
        rows: B, prompts decoded side by side.
        length: S, the most tokens of a row, with room for a block beyond the last one.

    Raises:
        UserError: Its attention can't be run this way; the loop of `drafter.decoding` can.
    """

    def __init__(
        self, target: Target, layer_ids: Sequence[int] = (), *, rows: int = 1, length: int
    ) -> None:
        self.target = target
        self.layer_ids = tuple(layer_ids)
        self.rows = rows
        self.length = length
        rope_type = asks_the_host(target.config)
        self._masks = AttentionMasks(
            target,
            "be decoded on fixed shapes",
            "Decode it kernel by kernel",
            {f"its rope is of type {rope_type}": rope_type is not None},
        )
        self._places = _Places()
        layers = [_StaticLayer(self._places, rows, length) for _ in range(target.num_layers)]
        self._cache = Cache(layers=layers)
        self._joined: list[Tensor] = []
        self._check()

    def run(
        self, ids_Bn: Tensor, positions_Bn: Tensor, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Runs tokens at positions, over all that lies before them in their rows.

        Args:
            ids_Bn: (B, n) int64.
            positions_Bn: (B, n) int64, ascending, below S; what lay there is overwritten.
            rows: Which rows these are; all of them by default.

        Returns:
            (B, n, D) states after the final norm, (B, n, L*D) tapped states.
        """
        key_S = torch.arange(self.length, device=positions_Bn.device)
        distance_BnS = positions_Bn[..., None] - key_S
        seen_BnS = distance_BnS >= 0
        return self._pass(ids_Bn, positions_Bn, positions_Bn, seen_BnS, distance_BnS, rows)

    def run_tree(
        self, ids_Bn: Tensor, start_B: Tensor, depths_Bn: Tensor, seen_Bnn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs a tree of tokens behind every row: each sees what lies there, and some of the tree.

        Args:
            ids_Bn: (B, n) int64; they are written to places start .. start + n - 1.
            start_B: (B,) int64, tokens that lie before it; all of them are seen.
            depths_Bn: (B, n) int64, tokens from the first one's position, 0 for that.
            seen_Bnn: (B, n, n) bool, which of them each one sees; at least itself.

        Returns:
            As `run`. What is kept of the tree must be moved to its positions (`move`) before the
            next pass: places in the cache are not positions.
        """
        rows, count = ids_Bn.shape
        start_B1 = start_B[:, None]
        key_S = torch.arange(self.length, device=ids_Bn.device)
        places_Bn, positions_Bn = start_B1 + key_S[:count], start_B1 + depths_Bn
        held_BnS = (key_S < start_B1)[:, None].expand(-1, count, -1)
        seen_BnS = held_BnS.scatter(2, places_Bn[:, None].expand(-1, count, -1), seen_Bnn)
        position_BS = key_S.expand(rows, -1).scatter(1, places_Bn, positions_Bn)
        distance_BnS = positions_Bn[..., None] - position_BS[:, None]
        return self._pass(ids_Bn, positions_Bn, places_Bn, seen_BnS, distance_BnS, slice(None))

    def join(self) -> None:
        """Lays the layers' buffers side by side, as `move` needs them: then it is two kernels."""
        found: dict[tuple[int, ...], list[tuple[CacheLayerMixin, str]]] = {}
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                found.setdefault(tuple(getattr(layer, name).shape), []).append((layer, name))
        for buffers in found.values():
            joined = torch.stack([getattr(layer, name) for layer, name in buffers])
            for view, (layer, name) in zip(joined, buffers, strict=True):
                setattr(layer, name, view)
            self._joined.append(joined)

    def move(self, sources_Bn: Tensor, places_Bn: Tensor) -> None:
        """Copies keys and values within their rows; all are read before the first is written.

        Args:
            sources_Bn: (B, n) int64 places.
            places_Bn: (B, n) int64, where they go.
        """
        for joined in self._joined:
            flat = joined.flatten(0, 1)  # layers' keys and values beside rows: a view
            sources, places = (index.repeat(len(joined), 1) for index in (sources_Bn, places_Bn))
            shape = (*sources.shape, flat.shape[3])
            states = flat.gather(2, sources[:, None, :, None].expand(-1, flat.shape[1], *shape[1:]))
            write(flat, states, places)

    def _pass(
        self,
        ids_Bn: Tensor,
        positions_Bn: Tensor,
        places_Bn: Tensor,
        seen_BnS: Tensor,
        distance_BnS: Tensor,
        rows: slice,
    ) -> tuple[Tensor, Tensor]:
        self._places.rows, self._places.index_Bn = rows, places_Bn
        return self.target.run(
            self.layer_ids,
            self._cache,
            input_ids=ids_Bn,
            position_ids=positions_Bn,
            attention_mask=self._masks.of(seen_BnS[:, None], distance_BnS[:, None]),
        )

    def _check(self) -> None:
        """Compares two passes with the target's own cache, across the window's edge if it has one.

        The second is taken back and run again: a place that is written twice shows the last.
        """
        target, device = self.target, self.target.device
        window = self._masks.window or 0
        known = max(1, min(self.length - CHECKED_BLOCK, max(CHECKED, window + 3)))
        total = min(self.length, known + CHECKED_BLOCK)
        ids = torch.arange(total, device=device) * 7 % target.vocab_size
        session = target.session()
        parts = [slice(0, known), slice(known, total)]
        expected = [
            session.forward(ids[part], self.layer_ids)[0] for part in parts if ids[part].numel()
        ]
        places, first = torch.arange(total, device=device)[None], slice(0, 1)
        found = []
        for part in parts[: len(expected)]:
            self.run(ids[None, part].flip(1), places[:, part], first)
            found.append(self.run(ids[None, part], places[:, part], first)[0][0])
        for ours, theirs in zip(found, expected, strict=True):
            if not same_states(ours, theirs, target.dtype):
                raise UserError(
                    f"The target {target.path} ({type(target.model).__name__}) does not give the "
                    "same states with a cache of fixed size; decode it kernel by kernel."
                )


def asks_the_host(config: Any) -> str | None:
    """Returns the type of rope that asks the host for a length, or None if there is none."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # or by layer type
    found = [kind["rope_type"] for kind in kinds if kind.get("rope_type") in HOST_ROPE]
    return str(found[0]) if found else None
