"""Rows that hold several documents, taken apart into one right-padded row per document, and back.

Legend: B rows, S tokens per row, P documents of the batch, T tokens of the longest, F features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drafter.blocks import PADDING_DOCUMENT, Span


class Unpacked(NamedTuple):
    """The documents of a batch, each in a row of its own."""

    input_ids: Tensor
    """(P, T) int64, 0 at padding."""
    inside: Tensor
    """(P, T) bool, false at padding."""
    source: Tensor
    """(B, S) bool, true where the packed rows have a token."""

    def pack(self, states_PTF: Tensor) -> Tensor:
        """Returns (B, S, F) with every token's state at its place, zero at padding."""
        if self.inside is self.source:
            return states_PTF.masked_fill(~self.source.unsqueeze(-1), 0.0)
        out = states_PTF.new_zeros(*self.source.shape, states_PTF.shape[-1])
        out[self.source] = states_PTF[self.inside]
        return out


def unpack(input_ids: Tensor, document_ids: Tensor, packed: bool | None = None) -> Unpacked:
    """Returns the documents of a batch; unless `packed` is False it waits for the device.

    Args:
        input_ids: (B, S) int64.
        document_ids: (B, S) int64; a document's tokens are adjacent; -1 at padding.
        packed: False if every row is known to be one document from its start; None looks.
    """
    real_BS = document_ids >= 0
    if packed is None:
        one_each = (document_ids == torch.where(real_BS, 0, -1)).all()
        right_padded = (real_BS[:, 1:] <= real_BS[:, :-1]).all()
        packed = not bool(one_each & right_padded)
    if not packed:
        return Unpacked(input_ids.masked_fill(~real_BS, 0), real_BS, real_BS)
    starts_BS = real_BS.clone()
    starts_BS[:, 1:] &= document_ids[:, 1:] != document_ids[:, :-1]
    document_BS = starts_BS.flatten().cumsum(0).view_as(document_ids) - 1
    lengths_P = torch.bincount(document_BS[real_BS])
    inside_PT = torch.arange(int(lengths_P.max()), device=input_ids.device) < lengths_P[:, None]
    unpacked_PT = torch.zeros_like(inside_PT, dtype=torch.long)
    unpacked_PT[inside_PT] = input_ids[real_BS]
    return Unpacked(unpacked_PT, inside_PT, real_BS)


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns (B, S) int64 ids and document ids of rows of one document each, right-padded.

    Args:
        rows: Token ids of each.
        device: Where the result goes.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    documents = torch.full_like(ids, PADDING_DOCUMENT)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.as_tensor(tokens)
        documents[row, : len(tokens)] = 0
    return ids.to(device), documents.to(device)


def pack(
    lengths: Sequence[int], row_length: int, slots: int = 0, most: int | None = None
) -> list[Span]:
    """Returns where to lay documents so that a batch is little work.

    First fit, the longest first. Every row is as long as the longest and has as many blocks as the
    fullest, so short documents can cost more in one row than in several: of some limits on the
    documents of a row, the one is taken that gives the fewest positions.

    Args:
        lengths: Tokens of each document.
        row_length: Tokens of a row; a longer document has a row of its own.
        slots: Block slots of a document, anchors times block size.
        most: Documents of a row; None tries 1, 2, 4, ...

    Example:
        >>> pack([3, 9, 5, 2], row_length=10)
        [Span(row=1, first=5, last=8), Span(row=0, first=0, last=9), Span(row=1, first=0, last=5), \
Span(row=1, first=8, last=10)]
    """
    if most is None:
        limits = {len(lengths), *(1 << i for i in range(len(lengths).bit_length()))}
        layouts = [pack(lengths, row_length, slots, limit) for limit in sorted(limits)]
        return min(layouts, key=lambda spans: _positions(spans, slots))
    used: list[list[int]] = []
    spans: dict[int, Span] = {}
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        row = next(
            (
                row
                for row, there in enumerate(used)
                if sum(there) + length <= row_length and len(there) < most
            ),
            len(used),
        )
        if row == len(used):
            used.append([])
        first = sum(used[row])
        spans[document] = Span(row, first, first + length)
        used[row].append(length)
    return [spans[document] for document in range(len(lengths))]


def _positions(spans: Sequence[Span], slots: int) -> int:
    """Returns rows times (context positions and block slots of a row)."""
    documents = Counter(span.row for span in spans)
    longest = max(span.last for span in spans)
    return len(documents) * (longest + slots * max(documents.values()))


def place(parts: Sequence[Tensor], spans: Sequence[Span], rows: int, length: int) -> Tensor:
    """Returns (rows, length, F) with each document's states at its place, zero elsewhere.

    Args:
        parts: (T_i, F) each; it may be shorter than its span: no block looks behind it.
        spans: As many.
        rows: B.
        length: S.
    """
    out = parts[0].new_zeros((rows, length, parts[0].shape[-1]))
    for part, (row, first, last) in zip(parts, spans, strict=True):
        out[row, first : first + min(len(part), last - first)] = part[: last - first]
    return out


def batches_by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Returns which rows to run together: alike in length, padding within `most_tokens`.

    Example:
        >>> batches_by_length([2, 9, 3, 2], most_tokens=6)
        [[1], [2, 0], [3]]
    """
    # the longest first, so that it sets its batch's size
    waiting = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while waiting:
        size = max(1, most_tokens // lengths[waiting[0]])
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches
