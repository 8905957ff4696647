"""Accepted lengths from the target's own trajectories, without the decoding loop.

Given a response that the target generated, one teacher-forced drafter pass over all its anchors
says what every block would have drafted, and so which rounds the real loop would have made.

Legend: S tokens of prompt and response, R response tokens, N drafted slots, K block size,
L tapped layers, D hidden size, T response positions that can be anchors (R - 1).

Sources: method.md, Replay. Greedy: a slot is accepted iff its draft is the trajectory's token.
Rejection sampling: given the target's sampled token x, "it was accepted" has probability
min(1, q(x)/p(x)) independently of everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from drafter.attention import build_visibility
from drafter.blocks import block_input_ids
from drafter.errors import UserError
from drafter.head import FrozenHead
from drafter.model import Drafter
from drafter.rounds import ResponseCounts, SlotResults, count_decoded, count_rounds, waste_by_anchor
from drafter.sampling import STREAM_THINNING, Sampling, argmax, keyed_uniforms, warp

__all__ = [
    "ResponseCounts",
    "SlotResults",
    "count_decoded",
    "count_rounds",
    "replay_slots",
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
        anchors_per_chunk: Bounds memory: blocks denoised at once.

    Raises:
        UserError: A sampled trajectory without log-probabilities.
    """
    if not sampling.greedy and log_probs is None:
        raise UserError(
            "a response lacks the target's log-probabilities, which replay at a temperature needs; "
            "let the target generate the responses (trust_responses off), or use temperature 0."
        )
    block_size, mask_id = drafter.config.block_size, drafter.config.mask_token_id
    device, total = input_ids.device, len(input_ids)
    response = total - prompt_length
    if response == 1:  # its only token is prefill's: no anchor, no round
        none = np.zeros((0, block_size - 1), dtype=bool)
        return SlotResults(none.astype(np.int64), none, none, none.astype(np.float64))
    offsets_K = torch.arange(block_size, device=device)
    context = drafter.encode_context(hidden_states, torch.arange(total, device=device)[None])
    document_ids = torch.zeros(1, total, dtype=torch.long, device=device)
    anchors_T = torch.arange(prompt_length, total - 1, device=device)
    index_TN = anchors_T[:, None] - prompt_length + offsets_K[1:]
    valid_TN = index_TN < response
    labels_TN = input_ids[prompt_length + index_TN.clamp(max=response - 1)]
    drafts, chosen = [], []
    for part_C, labels_CN in zip(
        anchors_T.split(anchors_per_chunk), labels_TN.split(anchors_per_chunk), strict=True
    ):
        block_ids = block_input_ids(input_ids[part_C][None], block_size, mask_id)
        # every trajectory has its own length: a compiled kernel would be compiled for each
        visibility = build_visibility(part_C[None], document_ids, block_size, "sdpa")
        positions = part_C[None, :, None] + offsets_K
        hidden = drafter.denoise(embed(block_ids), positions, context, visibility)
        flat_states, flat_labels = hidden[0, :, 1:].flatten(0, 1), labels_CN.flatten()
        rows = head.chunk_rows()
        for states, labels in zip(flat_states.split(rows), flat_labels.split(rows), strict=True):
            logits = head.logits(states)
            drafts.append(argmax(logits))
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
    return SlotResults(
        drafts_TN.cpu().numpy(),
        match_TN.cpu().numpy(),
        valid_TN.cpu().numpy(),
        accept_TN.cpu().numpy(),
        zero_target,
    )


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
