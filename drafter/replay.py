"""Accepted lengths from the target's own trajectories, without the decoding loop.

Given a response that the target generated, one teacher-forced drafter pass over all its anchors
says what every block would have drafted, and so which rounds the real loop would have made.

Legend: S tokens of prompt and response, R response tokens, N drafted slots, K block size,
L tapped layers, D hidden size, T response positions that can be anchors (R - 1), C of them.

Sources: method.md, Replay. Greedy: a slot is accepted iff its draft is the trajectory's token.
Rejection sampling: given the target's sampled token x, "it was accepted" has probability
min(1, q(x)/p(x)) independently of everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from drafter.attention import build_visibilities
from drafter.blocks import block_input_ids
from drafter.draft_length import DraftLength, confidence_of
from drafter.errors import UserError
from drafter.head import FrozenHead
from drafter.model import Drafter
from drafter.rounds import ResponseCounts, SlotResults, count_decoded, count_rounds, waste_by_anchor
from drafter.sampling import STREAM_THINNING, Sampling, argmax, keyed_uniforms, warp
from drafter.search import Search, grow

__all__ = [
    "ResponseCounts",
    "SlotResults",
    "count_decoded",
    "count_rounds",
    "replay_logits",
    "replay_slots",
    "replay_trees",
    "thin",
    "waste_by_anchor",
]


@torch.no_grad()
def replay_slots(
    drafter: Drafter,
    embed: Callable[[Tensor], Tensor],
    head: FrozenHead,
    hidden_states: Tensor,
    input_ids: Tensor,
    prompt_length: int,
    *,
    sampling: Sampling,
    log_probs: Tensor | None = None,
    length: DraftLength | None = None,
    anchors_per_chunk: int = 64,
) -> SlotResults:
    """Runs the drafter over every anchor of a trajectory, by the functions that decoding uses.

    Args:
        drafter: The unwrapped drafter.
        embed: The target's embedding.
        head: The target's head.
        hidden_states: (1, S, L*D) of the whole trajectory; a block sees those before its anchor.
        input_ids: (S,) prompt and response.
        prompt_length: Prompt tokens; the first anchor is the response's first token.
        sampling: Of the trajectory; the drafter's q is warped alike.
        log_probs: (R,) log p of the response's tokens; needed unless greedy.
        length: Cuts drafts; None verifies all slots.
        anchors_per_chunk: Bounds memory: blocks denoised at once.

    Raises:
        UserError: A sampled trajectory without log-probabilities.
    """
    if not sampling.greedy and log_probs is None:
        raise UserError(
            "a response lacks the target's log-probabilities, which replay at a temperature needs; "
            "let the target generate the responses (trust_responses off), or use temperature 0."
        )
    block_size = drafter.config.block_size
    device, total = input_ids.device, len(input_ids)
    response = total - prompt_length
    if response == 1:
        return _no_anchor(block_size)
    anchors_T, index_TN, valid_TN, labels_TN = _slots(input_ids, prompt_length, block_size)
    own_head = drafter.head(head)
    drafts, chosen, sure = [], [], []
    chunks = _chunks(drafter, embed, hidden_states, input_ids, anchors_T, anchors_per_chunk)
    for hidden_CND, labels_CN in zip(chunks, labels_TN.split(anchors_per_chunk), strict=True):
        flat_states, flat_labels = hidden_CND.flatten(0, 1), labels_CN.flatten()
        rows = own_head.chunk_rows()
        for states, labels in zip(flat_states.split(rows), flat_labels.split(rows), strict=True):
            logits = own_head.logits(states)
            drafts.append(argmax(logits))
            if length is not None:
                sure.append(confidence_of(drafter, states, logits))
            if not sampling.greedy:
                q = warp(logits, sampling)
                chosen.append(q.gather(-1, labels[:, None]).squeeze(-1).double())
    drafts_TN = torch.cat(drafts).view_as(labels_TN)
    match_TN = (drafts_TN == labels_TN) & valid_TN
    accept_TN, zero_target = match_TN.double(), 0
    if log_probs is not None and not sampling.greedy:
        p_R = log_probs.double().exp().to(device)
        zero_target = int((p_R == 0).sum())
        p_TN = p_R[index_TN.clamp(max=response - 1)]
        q_TN = torch.cat(chosen).view_as(p_TN)
        # q >= p rather than q / p >= 1: p may be 0
        accept_TN = torch.where((q_TN >= p_TN) & (q_TN > 0), 1.0, q_TN / p_TN.clamp(min=1e-300))
        accept_TN = accept_TN * valid_TN
    slots = SlotResults(
        drafts_TN.cpu().numpy(),
        match_TN.cpu().numpy(),
        valid_TN.cpu().numpy(),
        accept_TN.cpu().numpy(),
        zero_target,
    )
    if length is None:
        return slots
    sure_TN = torch.cat(sure).view_as(labels_TN)
    slots = replace(slots, confidence=sure_TN.double().cpu().numpy())
    return slots.cut(length.kept(sure_TN).cpu().numpy())


@torch.no_grad()
def replay_trees(
    drafter: Drafter,
    embed: Callable[[Tensor], Tensor],
    head: FrozenHead,
    hidden_states: Tensor,
    input_ids: Tensor,
    prompt_length: int,
    *,
    search: Search,
    seed: int,
    key: int,
    anchors_per_chunk: int = 64,
) -> SlotResults:
    """As `replay_slots`, of trees of drafts that are verified by sample-and-match.

    A slot is accepted iff the trajectory's tokens up to it are in the anchor's tree; which they are
    is certain, at any temperature: the counts are those of this trajectory. `drafts` and `match`
    are those of the argmax draft.

    Args:
        drafter: The unwrapped drafter.
        embed: The target's embedding.
        head: The target's head.
        hidden_states: (1, S, L*D).
        input_ids: (S,) prompt and response.
        prompt_length: Prompt tokens.
        search: How a block's marginals become a tree.
        seed: Of drafts that are drawn.
        key: The prompt's, likewise.
        anchors_per_chunk: Bounds memory: blocks denoised at once.
    """
    block_size = drafter.config.block_size
    response = len(input_ids) - prompt_length
    if response == 1:
        return _no_anchor(block_size)
    anchors_T, _, valid_TN, labels_TN = _slots(input_ids, prompt_length, block_size)
    wanted = [row[valid].tolist() for row, valid in zip(labels_TN, valid_TN, strict=True)]
    drafts, reached, nodes = [], list[int](), list[int]()
    own_head = drafter.head(head)
    at_once = max(1, own_head.chunk_rows() // (block_size - 1))
    for hidden_CND in _chunks(
        drafter, embed, hidden_states, input_ids, anchors_T, anchors_per_chunk
    ):
        for states_GND in hidden_CND.split(at_once):
            logits_GNV = own_head.logits(states_GND)
            drafts.append(argmax(logits_GNV))
            place, (count, slots) = len(reached), states_GND.shape[:2]
            trees = grow(search, logits_GNV, search.uniforms(seed, key, place, count, slots))
            for tree, tokens in zip(trees, wanted[place : place + count], strict=True):
                reached.append(len(tree.follow(tokens)))
                nodes.append(sum(depth <= response - 1 - len(nodes) for depth in tree.depths))
    drafts_TN = torch.cat(drafts)
    slot_N, reached_T = np.arange(block_size - 1), np.array(reached)
    return SlotResults(
        drafts_TN.cpu().numpy(),
        ((drafts_TN == labels_TN) & valid_TN).cpu().numpy(),
        valid_TN.cpu().numpy(),
        (slot_N < reached_T[:, None]).astype(np.float64),
        reached=reached_T,
        nodes=np.array(nodes),
    )


def _no_anchor(block_size: int) -> SlotResults:
    """The results of a response whose only token is prefill's: no anchor, no round."""
    none = np.zeros((0, block_size - 1), dtype=bool)
    return SlotResults(none.astype(np.int64), none, none, none.astype(np.float64))


def _slots(
    input_ids: Tensor, prompt_length: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns anchors (T,), and of their slots (T, N) places in the response, validity, labels."""
    device, total = input_ids.device, len(input_ids)
    anchors_T = torch.arange(prompt_length, total - 1, device=device)
    offsets_N = torch.arange(1, block_size, device=device)
    index_TN = anchors_T[:, None] - prompt_length + offsets_N
    response = total - prompt_length
    labels_TN = input_ids[prompt_length + index_TN.clamp(max=response - 1)]
    return anchors_T, index_TN, index_TN < response, labels_TN


@torch.no_grad()
def replay_logits(
    drafter: Drafter,
    embed: Callable[[Tensor], Tensor],
    head: FrozenHead,
    hidden_states: Tensor,
    input_ids: Tensor,
    prompt_length: int,
    anchor: int,
    *,
    anchors_per_chunk: int = 64,
) -> Tensor:
    """Returns the logits (N, V) that `replay_slots` drafted from at one response token.

    The same chunk of blocks and the same rows of the head run again, so that rounding is the same.

    Args:
        drafter: As `replay_slots`, like the others.
        embed: The target's embedding.
        head: The target's head.
        hidden_states: (1, S, L*D).
        input_ids: (S,).
        prompt_length: Prompt tokens.
        anchor: Place in the response.
        anchors_per_chunk: As it was there.
    """
    anchors_T = torch.arange(prompt_length, len(input_ids) - 1, device=input_ids.device)
    chunks = _chunks(drafter, embed, hidden_states, input_ids, anchors_T, anchors_per_chunk)
    own_head = drafter.head(head)
    for number, hidden_CND in enumerate(chunks):
        place = anchor - number * anchors_per_chunk
        if place < len(hidden_CND):
            drafted = hidden_CND.shape[1]
            first, found = place * drafted, []
            rows = own_head.chunk_rows()
            for start, states in enumerate(hidden_CND.flatten(0, 1).split(rows)):
                begin, end = start * rows, start * rows + len(states)
                if begin < first + drafted and end > first:
                    logits = own_head.logits(states)
                    found.append(logits[max(0, first - begin) : first + drafted - begin])
            return torch.cat(found)
    raise AssertionError("no block has its anchor there")


def _chunks(
    drafter: Drafter,
    embed: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    input_ids: Tensor,
    anchors_T: Tensor,
    anchors_per_chunk: int,
) -> Iterator[Tensor]:
    """Yields the states (C, N, D) of the drafted slots, a chunk of C anchors at a time."""
    block_size, mask_id = drafter.config.block_size, drafter.config.mask_token_id
    device, total = input_ids.device, len(input_ids)
    offsets_K = torch.arange(block_size, device=device)
    context = drafter.encode_context(hidden_states, torch.arange(total, device=device)[None])
    document_ids = torch.zeros(1, total, dtype=torch.long, device=device)
    for part_C in anchors_T.split(anchors_per_chunk):
        block_ids = block_input_ids(input_ids[part_C][None], block_size, mask_id)
        # every trajectory has its own length: a compiled kernel would be compiled for each
        visibility = build_visibilities(
            drafter.config.layer_attention, part_C[None], document_ids, block_size, "sdpa"
        )
        positions = part_C[None, :, None] + offsets_K
        yield drafter.denoise(embed(block_ids), positions, context, visibility)[0, :, 1:]


def thin(slots: SlotResults, *, seed: int, prompt_id: int) -> SlotResults:
    """Decides every acceptance by its own keyed uniform: one draw of the real sampler's rounds.

    Args:
        slots: With acceptance probabilities.
        seed: Of the thinning.
        prompt_id: With the seed, the key: the result depends on nothing else.
    """
    shape = slots.accept.shape
    uniforms = keyed_uniforms(seed, prompt_id, shape[0] * shape[1], STREAM_THINNING)
    accept = (uniforms.reshape(shape) < slots.accept).astype(np.float64)
    return replace(slots, accept=accept)
