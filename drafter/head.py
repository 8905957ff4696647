"""Scores drafter states against the target's frozen head, a chunk of slots at a time.

Legend: T scored slots (flattened), D hidden size, V vocabulary (rows of the head), C slots in a
chunk.

The head never trains, so `d log q(y) / d hidden` needs nothing that the forward pass has not
already at hand: it is computed there, one chunk at a time, and kept as (T, D). The backward pass
is then one multiplication by the upstream gradient; no (T, V) tensor and no head gradient is ever
formed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drafter.blocks import Blocks
from drafter.draft_vocabulary import ReducedHead
from losses.scores import BlockScores

if TYPE_CHECKING:
    from drafter.soft_labels import SoftLabels
    from drafter.whole_scores import TargetStates

CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 23}
"""Most logits held at once, by device: 2^26 fp32 values are 256 MiB, and `logit_buffers` of
`drafter.memory` such buffers live together. A CPU is faster with chunks near its caches' size."""

WHOLE_SHARE = 4
"""By this much chunks are smaller where seven buffers live together (`drafter.whole_scores`)."""


class SlotScores(NamedTuple):
    """What the head says of each scored slot."""

    log_prob: Tensor
    """(T,) fp32 (fp64 for an fp64 head), log q(label)."""
    correct: Tensor
    """(T,) bool, whether the argmax (lowest id on ties) is the label."""
    further: dict[str, Tensor]
    """(T,) each, like log_prob: `kl`, KL(p || q) in nats, if soft labels were given; and what
    `TargetStates` name."""


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """The target's output projection: `logits = softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        weight: (V, D), any float dtype. Its dtype is the one the matrix products run in.
        bias: (V,) or None.
        scale: Multiplies the logits (Cohere's `logit_scale`; the inverse of Granite's
            `logits_scaling`).
        softcap: Gemma's final soft-capping `c * tanh(logits / c)`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V, the number of rows."""
        return self.weight.shape[0]

    @property
    def score_dtype(self) -> torch.dtype:
        """Of logits and scores: fp32, or fp64 for an fp64 head."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def to(self, device: torch.device) -> FrozenHead:
        """Returns the head with its weights on a device; itself if they are there."""
        if self.weight.device == device:
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V) in fp32 (fp64 for an fp64 head) of hidden states (..., D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            flat_TD = hidden.reshape(-1, hidden.shape[-1]).to(self.weight.dtype)
            logits_TV = matmul_fp32(flat_TD, self.weight.t())
            if self.bias is not None:
                logits_TV = logits_TV + self.bias.to(logits_TV.dtype)
            if self.scale != 1.0:
                logits_TV = logits_TV * self.scale
            if self.softcap is not None:
                logits_TV = self.softcap * torch.tanh(logits_TV / self.softcap)
        return logits_TV.reshape(*hidden.shape[:-1], self.vocab_size)

    def chunk_rows(self, whole: bool = False) -> int:
        """Returns how many slots' logits are held at once on the head's device.

        Args:
            whole: Whether scores are wanted that need both models' distributions: seven buffers
                live together then, not one or two.
        """
        elements = CHUNK_ELEMENTS.get(self.weight.device.type, CHUNK_ELEMENTS["cuda"])
        return max(1, elements // self.vocab_size // (WHOLE_SHARE if whole else 1))


def score_slots(
    head: FrozenHead,
    hidden_TD: Tensor,
    labels_T: Tensor,
    chunk_rows: int | None = None,
    *,
    soft: SoftLabels | None = None,
    target: TargetStates | None = None,
    compiled: bool = False,
) -> SlotScores:
    """Returns log-probabilities and correctness of labels, differentiable in `hidden_TD` only.

    Args:
        head: The target's frozen head.
        hidden_TD: (T, D) drafter states after its final norm; T may be 0.
        labels_T: (T,) int64 token ids.
        chunk_rows: Slots per chunk; default by `CHUNK_ELEMENTS`.
        soft: The target's distribution at each slot, for its divergence.
        target: What it is made of, for scores that need all of it.
        compiled: Let torch.compile fuse the work between the matrix products.
    """
    rows = chunk_rows or head.chunk_rows(whole=target is not None)
    how = _How(rows, _compiled_fold() if compiled else _fold, soft, target)
    if hidden_TD.requires_grad and torch.is_grad_enabled():
        log_prob_T, correct_T, *rest = _ScoreSlots.apply(head, hidden_TD, labels_T, how)
        return SlotScores(log_prob_T, correct_T, dict(zip(how.further, rest, strict=True)))
    return _score(head, hidden_TD, labels_T, how, False)[0]


_Fold = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


class _How(NamedTuple):
    chunk_rows: int
    fold: _Fold
    soft: SoftLabels | None
    target: TargetStates | None

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the scores beside log q(label), in the order of their slopes."""
        kl = () if self.soft is None else ("kl",)
        return kl if self.target is None else (*kl, *self.target.names)


class _ScoreSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: FrozenHead,
        hidden_TD: Tensor,
        labels_T: Tensor,
        how: _How,
    ) -> tuple[Tensor, ...]:
        scores, slopes = _score(head, hidden_TD, labels_T, how, True)
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(scores.correct)
        return scores.log_prob, scores.correct, *scores.further.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        slope_TD, *slopes = ctx.saved_tensors
        grad_TD = grad_T.unsqueeze(-1) * slope_TD
        for further_T, further_TD in zip(grads, slopes, strict=True):
            grad_TD = grad_TD + further_T.unsqueeze(-1) * further_TD
        return None, grad_TD.to(slope_TD.dtype), None, None


@torch.no_grad()
def _score(
    head: FrozenHead,
    hidden_TD: Tensor,
    labels_T: Tensor,
    how: _How,
    with_slope: bool,
) -> tuple[SlotScores, list[Tensor]]:
    """Returns the scores and, if asked for, their slopes.

    Slopes are d log q(label) / d hidden (T, D), and the same of each further score.
    """
    log_prob_T = torch.empty(len(labels_T), dtype=head.score_dtype, device=hidden_TD.device)
    correct_T = torch.empty(len(labels_T), dtype=torch.bool, device=hidden_TD.device)
    further = {name: torch.empty_like(log_prob_T) for name in how.further}
    slopes = [torch.empty_like(hidden_TD) for _ in range(len(further) + 1) if with_slope]
    for start in range(0, len(labels_T), how.chunk_rows):
        part = slice(start, start + how.chunk_rows)
        hidden_CD, labels_C1 = hidden_TD[part], labels_T[part].unsqueeze(-1)
        target = None if how.target is None else how.target.at(part)
        chunk = _score_chunk(head, hidden_CD, labels_C1, how.fold, target, with_slope)
        log_prob_T[part], correct_T[part] = chunk.log_prob, chunk.correct
        soft = None if how.soft is None else how.soft.at(part)
        if soft is not None:
            mean_C = mean_logit(head, hidden_CD, soft.rows, soft.bias)
            further["kl"][part] = chunk.log_total - mean_C - soft.entropy
        for name, (score_C, _) in chunk.whole.items():
            further[name][part] = score_C
        for slope_TD, slope_CD in zip(slopes, chunk.slopes(head, soft), strict=True):
            slope_TD[part] = slope_CD
    return SlotScores(log_prob_T, correct_T, further), slopes


def mean_logit(
    head: FrozenHead, hidden_CD: Tensor, rows_CD: Tensor, bias_C: Tensor | None
) -> Tensor:
    """Returns E_p[z] (C,) of states' logits, from `SoftLabels`' rows and bias, in their dtype."""
    seen_CD = hidden_CD.to(head.weight.dtype).to(rows_CD.dtype)  # rounded as the head sees it
    mean_C = (seen_CD * rows_CD).sum(-1)
    return (mean_C if bias_C is None else mean_C + bias_C) * head.scale


class _Chunk(NamedTuple):
    """A chunk's scores; its logits are gone before the next one's are made."""

    log_prob: Tensor
    """(C,), log q(label)."""
    correct: Tensor
    """(C,) bool."""
    log_total: Tensor
    """(C,), log sum_v exp z_v."""
    label_rows: Tensor | None
    """(C, D), cap'_y W_y, and ..."""
    mean_rows: Tensor | None
    """(C, D), sum_v q_v cap'_v W_v, if slopes are wanted."""
    whole: dict[str, tuple[Tensor, Tensor | None]]
    """See `TargetStates.scores`."""

    def slopes(self, head: FrozenHead, soft: SoftLabels | None) -> list[Tensor]:
        """Returns the slopes (C, D) of log q(y), of KL(p || q) with soft labels, and of `whole`."""
        if self.mean_rows is None or self.label_rows is None:
            return []
        slopes = [(self.label_rows - self.mean_rows) * head.scale]
        if soft is not None:
            slopes.append((self.mean_rows - soft.rows) * head.scale)
        return [*slopes, *(slope_CD for _, slope_CD in self.whole.values() if slope_CD is not None)]


def _score_chunk(
    head: FrozenHead,
    hidden_CD: Tensor,
    labels_C1: Tensor,
    fold: _Fold,
    target: TargetStates | None,
    with_slope: bool,
) -> _Chunk:
    logits_CV = head.logits(hidden_CD)
    label_logit_C1 = logits_CV.gather(-1, labels_C1)
    whole: dict[str, tuple[Tensor, Tensor | None]] = {}
    if target is not None:  # before the logits are folded up
        whole = target.scores(head, logits_CV, with_slope)
    top_C1, top_id_C1, total_C1, weights_CV = fold(
        logits_CV, head.softcap, head.weight.dtype if with_slope else None
    )
    log_C1 = total_C1.log()
    label_rows_CD = mean_rows_CD = None
    if weights_CV is not None:
        label_rows_CD = head.weight[labels_C1.squeeze(-1)].to(total_C1.dtype)
        if head.softcap is not None:
            label_rows_CD = label_rows_CD * cap_slope(label_logit_C1, head.softcap)
        mean_rows_CD = weighted_rows(head, weights_CV) / total_C1
    return _Chunk(
        (label_logit_C1 - top_C1 - log_C1).squeeze(-1),
        (top_id_C1 == labels_C1).squeeze(-1),
        (top_C1 + log_C1).squeeze(-1),
        label_rows_CD,
        mean_rows_CD,
        whole,
    )


def _fold(
    logits_CV: Tensor, softcap: float | None, dtype: torch.dtype | None, in_place: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns what scores need of a chunk's logits, of which nothing else is kept.

    Args:
        logits_CV: In fp32 or fp64.
        softcap: See `FrozenHead`.
        dtype: Of the weights; None if they are not needed.
        in_place: Overwrite the logits: one (C, V) buffer serves both.

    Returns:
        (C, 1) each: the largest logit, its id (the lowest on ties), and sum_v e_v with
        e_v = exp(logit - largest); and weights (C, V) e_v * cap'_v, or None.
    """
    top_C1, top_id_C1 = logits_CV.max(dim=-1, keepdim=True)
    cap_slope_CV = None
    if dtype is not None and softcap is not None:
        cap_slope_CV = cap_slope(logits_CV, softcap)
    exp_CV = logits_CV.sub_(top_C1).exp_() if in_place else (logits_CV - top_C1).exp()
    total_C1 = exp_CV.sum(dim=-1, keepdim=True)
    if dtype is None:
        return top_C1, top_id_C1, total_C1, None
    if cap_slope_CV is not None:
        exp_CV = exp_CV.mul_(cap_slope_CV) if in_place else exp_CV * cap_slope_CV
    return top_C1, top_id_C1, total_C1, exp_CV.to(dtype)


@functools.cache
def _compiled_fold() -> _Fold:
    # not in place: the compiler would then write the exponentials back, which nobody reads
    return torch.compile(functools.partial(_fold, in_place=False))


def cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Returns the derivative of soft-capping, of capped logits."""
    return 1 - (logits / softcap).square()


def weighted_rows(head: FrozenHead, weights_CV: Tensor) -> Tensor:
    """Returns sum_v weights_v W_v, (C, D) in fp32 (fp64 for an fp64 head)."""
    with torch.autocast(weights_CV.device.type, enabled=False):
        return matmul_fp32(weights_CV, head.weight)


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ right` with an fp32 result, without rounding sums to bf16 where it can."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and not (left.requires_grad and torch.is_grad_enabled()):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def score_blocks(
    head: FrozenHead | ReducedHead,
    hidden_BAKD: Tensor,
    blocks: Blocks,
    num_slots: int | None = None,
    *,
    soft: SoftLabels | None = None,
    target: TargetStates | None = None,
    confidence: Tensor | None = None,
    fixed_shape: bool = False,
    compiled: bool = False,
) -> BlockScores:
    """Returns the scores of a batch's blocks; slot 0 and invalid slots never reach the head.

    Args:
        head: The target's frozen head, or its rows of a reduced draft vocabulary: q is then over
            those, and a label outside has log q = -inf, is not correct, and is marked `outside`.
        hidden_BAKD: (B, A, K, D) drafter states.
        blocks: Of the same B rows and A anchors.
        num_slots: Valid slots, if known on the host: counting them on a GPU would wait for it.
        soft: Of the B * S positions; a label's are those of the position before it. Made by the
            same rows as q.
        target: Likewise.
        confidence: (B, A, K) logits of the drafter's confidence head.
        fixed_shape: Let the head see invalid slots too, for the same scores: no shape on the way
            then depends on which slots are valid, as CUDA graphs need it.
        compiled: See `score_slots`.
    """
    valid_MN = blocks.valid.flatten(0, 1)
    flat_valid = valid_MN.flatten()
    drafted_SD = hidden_BAKD[:, :, 1:].reshape(len(flat_valid), -1)
    labels_S = blocks.labels.flatten()
    chunk_rows, outside_S = None, None
    if isinstance(head, ReducedHead):
        labels_S = head.draft_ids[labels_S]
        outside_S = (labels_S < 0) & flat_valid
        labels_S = labels_S.clamp(min=0)
        # p is over all tokens
        chunk_rows = None if target is None else head.chunk_rows(whole=True)
        head = head.rows
    if blocks.slots is not None:
        first_M1 = torch.arange(len(valid_MN), device=flat_valid.device).unsqueeze(-1)
        state_S = (first_M1 * valid_MN.shape[1] + blocks.slots.flatten(0, 1)).flatten()
    confidence_MN = None
    if confidence is not None:
        confidence_MN = confidence[:, :, 1:].flatten(0, 1)
        if blocks.slots is not None:
            confidence_MN = confidence_MN.gather(1, blocks.slots.flatten(0, 1))
        confidence_MN = torch.where(valid_MN, confidence_MN, 0.0).to(head.score_dtype)
    place_S = None
    if soft is not None:
        place_S = _before_labels(blocks, len(soft.entropy))
    elif target is not None:
        place_S = _before_labels(blocks, len(target.hidden))
    if fixed_shape:
        if blocks.slots is not None:
            drafted_SD = drafted_SD.index_select(0, state_S)
        if place_S is not None:
            soft, target = soft and soft.at(place_S), target and target.at(place_S)
        scores = score_slots(
            head, drafted_SD, labels_S, chunk_rows, soft=soft, target=target, compiled=compiled
        )

        def masked(score_S: Tensor) -> Tensor:
            return torch.where(flat_valid, score_S, 0.0).view_as(valid_MN)

        return _block_scores(
            outside_S,
            log_prob=masked(scores.log_prob),
            correct=(scores.correct & flat_valid).view_as(valid_MN),
            valid=valid_MN,
            confidence=confidence_MN,
            **{name: masked(score_S) for name, score_S in scores.further.items()},
        )
    if num_slots is None:
        index_T = flat_valid.nonzero().squeeze(-1)
    else:
        index_T = torch.nonzero_static(flat_valid, size=num_slots).squeeze(-1)
    if place_S is not None:
        place_T = place_S[index_T]
        soft, target = soft and soft.at(place_T), target and target.at(place_T)
    scores = score_slots(
        head,
        # not by indexing: its backward would sort the index
        drafted_SD.index_select(0, index_T if blocks.slots is None else state_S[index_T]),
        labels_S[index_T],
        chunk_rows,
        soft=soft,
        target=target,
        compiled=compiled,
    )

    def spread(score_T: Tensor) -> Tensor:
        zeros_S = score_T.new_zeros(len(flat_valid))
        return zeros_S.index_copy(0, index_T, score_T).view_as(valid_MN)

    return _block_scores(
        outside_S,
        log_prob=spread(scores.log_prob),
        correct=spread(scores.correct),
        valid=valid_MN,
        confidence=confidence_MN,
        **{name: spread(score_T) for name, score_T in scores.further.items()},
    )


def _block_scores(
    outside_S: Tensor | None,
    *,
    log_prob: Tensor,
    correct: Tensor,
    valid: Tensor,
    **further: Tensor | None,
) -> BlockScores:
    """Returns scores (M, N) in which labels outside a reduced vocabulary are impossible."""
    if outside_S is None:
        return BlockScores(log_prob, correct, valid, **further)
    outside = outside_S.view_as(valid)
    log_prob = torch.where(outside, -torch.inf, log_prob)  # no gradient there
    return BlockScores(log_prob, correct & ~outside, valid, outside=outside, **further)


def _before_labels(blocks: Blocks, positions: int) -> Tensor:
    """Returns (B * A * N,) places, among B * S flattened positions, before each slot's label."""
    rows, _, drafted = blocks.labels.shape
    length = positions // rows
    slots = blocks.slots
    if slots is None:
        slots = torch.arange(drafted, device=blocks.anchors.device)
    # the label of slot k = 1..N is the token at anchor + k; invalid slots are scored nowhere
    place_BAN = (blocks.anchors.clamp(min=0).unsqueeze(-1) + slots).clamp(max=length - 1)
    first_B11 = torch.arange(rows, device=place_BAN.device).view(-1, 1, 1) * length
    return (place_BAN + first_B11).flatten()
