"""Anchors to block inputs, labels, cumulative validity and positions; the batch of training.

Legend: B rows, S tokens per row, A anchors per row, K block size, N = K-1 drafted slots,
L tapped layers, D hidden size.

The conventions of slot 0 and of offsets live here: slot k of a block sits at row index anchor + k
and predicts the token there (same-position prediction, no shift); slot 0 is the anchor itself,
never scored. Where training shows a block's first slots too (`VisiblePrefix`), what is scored is
counted from the slot behind them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drafter.errors import UserError

INVALID_ANCHOR = -1
PADDING_DOCUMENT = -1

LastHidden = Literal["soft_labels", "states"] | None
"""What a loss needs of the states that the target's head reads: nothing, what `SoftLabels` take of
them, or the states themselves."""


class Span(NamedTuple):
    """A document's place in a batch."""

    row: int
    first: int
    last: int
    """Behind its last token."""


@dataclass
class DraftBatch:
    """Rows of conversations with their anchors, with or without the target's hidden states.

    Attributes:
        input_ids: (B, S) int64, right-padded.
        supervised: (B, S) bool, tokens that the target would have to write.
        document_ids: (B, S) int64, which document of the row a token belongs to; -1 at padding.
        positions: (B, S) int64, position within the document.
        anchors: (B, A) int64 row indices, ascending; -1 for an invalid block.
        visible: (B, A) int64, how many of a block's first drafted slots show their true tokens; or
            None, where none does.
        sample_ids: (P,) int64, each document's place in its source; P = B unless rows are packed.
            On the host wherever the rest is: only the host reads them.
        valid_counts: (N,) int64, valid slots of this batch at each drafted position.
        window_counts: (N,) int64, the same summed over the accumulation window (this rank only).
        hidden_states: (B, S, L*D) tapped layers side by side, or None before they are added.
        last_hidden: (B, S, D) what the head reads (after the final norm), if a loss asks for it.
        soft_labels: (B, S, D + 1 or D + 2) packed `SoftLabels` in its place, where they are kept
            and no loss asks for more.
    """

    input_ids: Tensor
    supervised: Tensor
    document_ids: Tensor
    positions: Tensor
    anchors: Tensor
    sample_ids: Tensor
    valid_counts: Tensor | None = None
    window_counts: Tensor | None = None
    hidden_states: Tensor | None = None
    last_hidden: Tensor | None = None
    soft_labels: Tensor | None = None
    visible: Tensor | None = None
    num_slots: int | None = None
    """Valid slots of this batch, known on the host so that the step needs no device sync."""
    spans: tuple[Span, ...] | None = None
    """Where each document lies, in the order of `sample_ids`; None: one in each row, from its start
    to its padding."""

    def document_spans(self) -> tuple[Span, ...]:
        """Returns where each document lies; waits for the device if `spans` is not set."""
        if self.spans is not None:
            return self.spans
        lengths = (self.document_ids >= 0).sum(1).tolist()
        return tuple(Span(row, 0, length) for row, length in enumerate(lengths))

    @property
    def packed(self) -> bool:
        """Whether rows are other than one document each, in the order of `sample_ids`."""
        spans = self.spans or ()
        return any(row != place or first for place, (row, first, _) in enumerate(spans))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DraftBatch:
        """Returns a copy whose tensors, but for `sample_ids`, are on `device`."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return dataclasses.replace(moved, sample_ids=self.sample_ids)

    def pin_memory(self) -> DraftBatch:
        """Returns a copy in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: object) -> DraftBatch:
        assert callable(function)
        values = {
            field.name: function(value) if isinstance(value, Tensor) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        return DraftBatch(**values)


@dataclass
class Blocks:
    """Draft blocks of a batch.

    Attributes:
        anchors: (B, A) int64, -1 for an invalid block.
        input_ids: (B, A, K) int64, the anchor token, visible tokens, and then mask tokens.
        labels: (B, A, N) int64, token at anchor + k for k = 1..N; 0 where not valid.
        valid: (B, A, N) bool, cumulative: slot k iff slots 1..k lie in the anchor's document and
            its supervised span.
        positions: (B, A, K) int64, position in the document, for RoPE.
        slots: None where column k of `labels` and `valid` is slot k. Of a block that shows v slots
            column k is slot v + k, and its last v columns are not valid: (B, A, N) int64 in 0..N-1,
            the column that each would be if nothing were shown.
    """

    anchors: Tensor
    input_ids: Tensor
    labels: Tensor
    valid: Tensor
    positions: Tensor
    slots: Tensor | None = None


@dataclass(frozen=True)
class VisiblePrefix:
    """Lets training blocks show the true tokens of some of their first drafted slots.

    What is shown is not predicted: a block that shows v slots is scored as one that begins behind
    them, positional weights included, and so the drafter learns to go on from a draft of which a
    part is known. The number of slots shown is v = 1, 2, ... with probability proportional to
    base^v, up to the last but one of the block's valid slots. Inference and validation show none;
    train/accepted_length counts from the first slot that is hidden.
    Source: the variable-prefix drafter of D2SD (arXiv 2606.04446; base 0.9 in its public code). It
    is a second drafter there, of which every block shows some. A single one must draft from the
    anchor alone too, so that only a share of the blocks do [inferred].

    Args:
        share: Share of the blocks that show some slots, 0 to 1; 0 for none.
        base: Above 0, at most 1; 1 makes all lengths alike.

    Raises:
        UserError: Out of these ranges.
    """

    share: float = 0.0
    base: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"visible_prefix.share is {self.share}; give 0 to 1.")
        if not 0 < self.base <= 1:
            raise UserError(f"visible_prefix.base is {self.base}; give a number in (0, 1].")

    def sample(
        self,
        supervised_S: np.ndarray,
        anchors_A: np.ndarray,
        block_size: int,
        *,
        seed: int,
        sample_id: int,
        epoch: int,
    ) -> np.ndarray:
        """Returns (A,) int64, how many drafted slots each block of one document shows.

        A pure function of its arguments, as `sample_anchors` is, whose draws it leaves alone.

        Args:
            supervised_S: (S,) bool of the document.
            anchors_A: (A,) int64 of it, without invalid ones.
            block_size: K.
            seed: The run's seed.
            sample_id: The row's place in its source.
            epoch: Training epoch.
        """
        key = np.random.SeedSequence((seed, sample_id, epoch), spawn_key=(1,))
        draws_A2 = np.random.Generator(np.random.Philox(key)).random((len(anchors_A), 2))
        ends = np.append(np.flatnonzero(~supervised_S), len(supervised_S))
        slots_A = ends[np.searchsorted(ends, anchors_A + 1)] - anchors_A - 1
        most_A = np.minimum(slots_A, block_size - 1) - 1
        # the inverse of the cumulative distribution, between its steps
        if self.base == 1:
            place_A = draws_A2[:, 1] * most_A
        else:
            below_A = draws_A2[:, 1] * (1 - self.base**most_A)
            place_A = np.log1p(-below_A) / math.log(self.base)
        length_A = np.minimum(1 + np.floor(place_A).astype(np.int64), most_A)
        return np.where(draws_A2[:, 0] < self.share, length_A, 0)


def candidates(supervised_S: np.ndarray, document_ids_S: np.ndarray | None = None) -> np.ndarray:
    """Returns the indices that may be anchors: supervised, and the next token is supervised too.

    Args:
        supervised_S: (S,) bool.
        document_ids_S: (S,) int, or None for a single document.
    """
    both = supervised_S[:-1] & supervised_S[1:]
    if document_ids_S is not None:
        both = both & (document_ids_S[:-1] == document_ids_S[1:]) & (document_ids_S[:-1] >= 0)
    return np.flatnonzero(both)


def sample_anchors(
    supervised_S: np.ndarray, num_anchors: int, *, seed: int, sample_id: int, epoch: int
) -> np.ndarray:
    """Returns (num_anchors,) int64 anchors of one document, ascending, padded with -1.

    Drawn without replacement as a pure function of (seed, sample_id, epoch): neither the batch's
    other samples nor the order of calls matters.

    Args:
        supervised_S: (S,) bool of one document.
        num_anchors: A; documents with fewer candidates give invalid blocks.
        seed: The run's seed.
        sample_id: The row's place in its source.
        epoch: Training epoch.
    """
    found = candidates(np.asarray(supervised_S, dtype=bool))
    if len(found) > num_anchors:
        key = np.random.SeedSequence((seed, sample_id, epoch))
        draw = np.random.Generator(np.random.Philox(key))
        found = np.sort(draw.choice(found, size=num_anchors, replace=False))
    anchors = np.full(num_anchors, INVALID_ANCHOR, dtype=np.int64)
    anchors[: len(found)] = found
    return anchors


def build_blocks(batch: DraftBatch, block_size: int, mask_token_id: int) -> Blocks:
    """Returns the blocks at `batch.anchors`; runs where the batch is, without a device sync.

    Args:
        batch: Rows with anchors.
        block_size: K.
        mask_token_id: Fills slots 1..N of the input.
    """
    anchors_BA = batch.anchors
    rows, length = batch.input_ids.shape
    num_anchors = anchors_BA.shape[1]
    is_block_BA1 = (anchors_BA >= 0).unsqueeze(-1)
    offsets_K = torch.arange(block_size, device=anchors_BA.device)
    index_BAK = anchors_BA.clamp(min=0).unsqueeze(-1) + offsets_K
    inside_BAK = (index_BAK < length) & is_block_BA1
    flat_index = index_BAK.clamp(max=length - 1).view(rows, -1)

    def at_slots(tensor_BS: Tensor) -> Tensor:
        return tensor_BS.gather(1, flat_index).view(rows, num_anchors, block_size)

    tokens_BAK = at_slots(batch.input_ids)
    documents_BAK = at_slots(batch.document_ids)
    own_BAK = inside_BAK & at_slots(batch.supervised) & (documents_BAK == documents_BAK[..., :1])
    own_BAK = own_BAK & (documents_BAK >= 0)
    # cumulative: a gap (an unsupervised token, another document) ends the block for good
    valid_BAN = own_BAK[..., 1:].long().cumprod(-1).bool()
    anchor_tokens_BA = torch.where(is_block_BA1[..., 0], tokens_BAK[..., 0], mask_token_id)
    anchor_position_BA1 = at_slots(batch.positions)[..., :1]
    input_ids_BAK = block_input_ids(anchor_tokens_BA, block_size, mask_token_id)
    tokens_BAN, slots_BAN = tokens_BAK[..., 1:], None
    if batch.visible is not None:
        visible_BA1 = batch.visible.unsqueeze(-1)
        shown_BAN = valid_BAN & (offsets_K[:-1] < visible_BA1)
        shown_ids_BAN = torch.where(shown_BAN, tokens_BAN, input_ids_BAK[..., 1:])
        input_ids_BAK = torch.cat((input_ids_BAK[..., :1], shown_ids_BAN), dim=-1)
        moved_BAN = offsets_K[:-1] + visible_BA1
        slots_BAN = moved_BAN.clamp(max=block_size - 2)
        valid_BAN = valid_BAN.gather(-1, slots_BAN) & (moved_BAN < block_size - 1)
        tokens_BAN = tokens_BAN.gather(-1, slots_BAN)
    return Blocks(
        anchors=anchors_BA,
        input_ids=input_ids_BAK,
        labels=torch.where(valid_BAN, tokens_BAN, 0),
        valid=valid_BAN,
        positions=anchor_position_BA1 + offsets_K,
        slots=slots_BAN,
    )


def block_input_ids(anchor_tokens: Tensor, block_size: int, mask_token_id: int) -> Tensor:
    """Returns (..., K) int64 block inputs: the anchor token (...) at slot 0, then mask tokens."""
    masks = anchor_tokens.new_full((*anchor_tokens.shape, block_size - 1), mask_token_id)
    return torch.cat((anchor_tokens.unsqueeze(-1), masks), dim=-1)


def count_valid(batch: DraftBatch, block_size: int) -> Tensor:
    """Returns (N,) int64: the batch's valid slots at each drafted position."""
    return build_blocks(batch, block_size, mask_token_id=0).valid.flatten(0, 1).sum(0)
