"""How often a drafter's drafts are right under its own conventions, and under others one step away.

Legend: S tokens, A anchors, K block size, L tapped layers, D hidden size.

A drafter that was trained under another convention than it is run under accepts about one token and
says nothing. Run under the convention that it was trained with, it is right far more often: that
names the fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drafter.attention import build_visibilities
from drafter.blocks import DraftBatch, build_blocks, candidates
from drafter.mask_token import RESERVED_TOKENS
from drafter.model import Drafter
from drafter.sampling import argmax
from drafter.target import Target

FIRST_SLOTS = 4
"""Drafted slots that are compared: later ones are right too seldom to tell."""
CLEARLY = 0.05
"""Share of right drafts by which another convention must be better, beside chance."""


class Row(Protocol):
    """A conversation as tokens."""

    @property
    def input_ids(self) -> np.ndarray:
        """(S,) int."""
        ...

    @property
    def supervised(self) -> np.ndarray:
        """(S,) bool."""
        ...


@dataclass(frozen=True)
class Convention:
    """What a drafter may be run under.

    Attributes:
        layer_ids: Tapped layers, L, in order.
        mask_token_id: At drafted slots.
        block_size: K.
        label_shift: Slot k is held to the token at anchor + k + label_shift.
        position_shift: Slot k stands at position anchor + k + position_shift.
        sees_anchor: Whether a block sees the target's state at its own anchor.
    """

    layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    label_shift: int = 0
    position_shift: int = 0
    sees_anchor: bool = False

    @classmethod
    def of(cls, drafter: Drafter) -> Convention:
        """Returns what its config says."""
        config = drafter.config
        return cls(config.target_layer_ids, config.mask_token_id, config.block_size)


@dataclass(frozen=True)
class Rate:
    """Right drafts among drafts."""

    right: int
    drafts: int

    @property
    def share(self) -> float:
        """0 to 1; nan without drafts."""
        return self.right / self.drafts if self.drafts else math.nan

    def clearly_above(self, other: Rate) -> bool:
        """Returns whether it is, by more than chance (4 standard errors) and `CLEARLY`."""
        if not self.drafts or not other.drafts:
            return False
        variance = sum(r.share * (1 - r.share) / r.drafts for r in (self, other))
        return self.share - other.share > max(CLEARLY, 4 * math.sqrt(variance))

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.share:.1f} %"


def others(own: Convention, target: Target) -> dict[str, dict[str, Convention]]:
    """Returns conventions that differ from a drafter's own in one thing, by what that is."""
    layers: dict[str, Convention] = {}
    for name, ids in (
        ("one layer lower", tuple(i - 1 for i in own.layer_ids)),
        ("one layer higher", tuple(i + 1 for i in own.layer_ids)),
        ("in reverse order", own.layer_ids[::-1]),
    ):
        if min(ids) >= 0 and max(ids) < target.num_layers and ids != own.layer_ids:
            layers[name] = replace(own, layer_ids=ids)
    return {
        "layer ids": layers,
        "mask token": {
            f"{name} ({token})": replace(own, mask_token_id=token)
            for name, token in mask_candidates(target).items()
            if token != own.mask_token_id
        },
        "labels": {
            "one token later": replace(own, label_shift=1),
            "one token earlier": replace(own, label_shift=-1),
        },
        "positions": {
            "one higher": replace(own, position_shift=1),
            "one lower": replace(own, position_shift=-1),
        },
        "visibility": {"the anchor's own state seen": replace(own, sees_anchor=True)},
    }


def mask_candidates(target: Target) -> dict[str, int]:
    """Returns tokens that a drafter may have been trained with as its mask, by name."""
    tokenizer, known = target.tokenizer, target.tokenizer.get_vocab()
    found: dict[str, int | None] = {
        f"the tokenizer's {name} token": getattr(tokenizer, f"{name}_token_id", None)
        for name in ("mask", "pad", "eos", "unk", "bos")
    }
    found |= {token: known.get(token) for token in RESERVED_TOKENS}
    found["the row behind the last token"] = max(known.values(), default=-1) + 1
    out: dict[str, int] = {}
    for name, token in found.items():
        if token is not None and token < target.vocab_size and token not in out.values():
            out[name] = int(token)
    return out


class Examiner:
    """Scores one drafter on a few rows, under any convention.

    Args:
        drafter: Unwrapped, eval mode, where the target is.
        target: The frozen target.
        rows: A few, with anchors.
        anchors: At most so many a row, evenly spread.
    """

    def __init__(
        self, drafter: Drafter, target: Target, rows: Sequence[Row], anchors: int = 48
    ) -> None:
        self.drafter = drafter
        self.target = target
        self.batches = [self._batch(row, anchors) for row in rows]
        self._features: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def _batch(self, row: Row, most: int) -> DraftBatch:
        found = candidates(row.supervised)
        chosen = found[np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)]
        ids = torch.as_tensor(np.asarray(row.input_ids), dtype=torch.long)[None]
        return DraftBatch(
            input_ids=ids,
            supervised=torch.as_tensor(np.asarray(row.supervised))[None],
            document_ids=torch.zeros_like(ids),
            positions=torch.arange(ids.shape[1])[None],
            anchors=torch.as_tensor(chosen, dtype=torch.long)[None],
            sample_ids=torch.zeros(1, dtype=torch.long),
        ).to(self.target.device)

    def features(self, place: int, layer_ids: tuple[int, ...]) -> Tensor:
        """Returns (1, S, L*D) features of a row."""
        key = (place, layer_ids)
        if key not in self._features:
            batch = self.batches[place]
            self._features[key] = self.target.features(
                batch.input_ids, batch.document_ids, layer_ids, packed=False
            ).hidden_states
        return self._features[key]

    @torch.no_grad()
    def states(self, place: int, convention: Convention) -> Tensor:
        """Returns (A, K, D) drafter states of a row's blocks, as a training step computes them."""
        batch, config = self.batches[place], self.drafter.config
        blocks = build_blocks(batch, convention.block_size, convention.mask_token_id)
        # windows stay where they are in the context when the anchor moves
        further = int(convention.sees_anchor)
        layers = [
            one._replace(window=one.window and one.window + further)
            for one in config.layer_attention
        ]
        visibility = build_visibilities(
            layers,
            batch.anchors + further,
            batch.document_ids,
            convention.block_size,
            "sdpa",
        )
        hidden: Tensor = self.drafter(
            self.features(place, convention.layer_ids),
            batch.positions,
            self.target.embed(blocks.input_ids),
            blocks.positions + convention.position_shift,
            visibility,
        )
        return hidden[0]

    @torch.no_grad()
    def rate(self, convention: Convention) -> Rate:
        """Returns how many of the first drafts are the row's own tokens."""
        right = drafts = 0
        slots = min(FIRST_SLOTS, convention.block_size - 1)
        for place, batch in enumerate(self.batches):
            hidden_AND = self.states(place, convention)[:, 1 : 1 + slots]
            draft_AN = argmax(self.drafter.head(self.target.head).logits(hidden_AND))
            offsets_N = torch.arange(1, 1 + slots, device=draft_AN.device)
            index_AN = batch.anchors[0][:, None] + offsets_N + convention.label_shift
            length = batch.input_ids.shape[1]
            inside_AN = index_AN < length
            index_AN = index_AN.clamp(max=length - 1)
            valid_AN = inside_AN & batch.supervised[0][index_AN]
            right_AN = (batch.input_ids[0][index_AN] == draft_AN) & valid_AN
            right, drafts = right + int(right_AN.sum()), drafts + int(valid_AN.sum())
        return Rate(right, drafts)
