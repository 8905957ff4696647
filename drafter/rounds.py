"""Rounds from slot acceptances: what is counted over a response, by walk or by expectation.

Legend: R response tokens, N drafted slots, K block size, T response positions that can be anchors
(R - 1).

Source: method.md, Rounds and Replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from drafter.verification import Round, unclipped_length

FloatArray = np.ndarray


@dataclass(frozen=True)
class SlotResults:
    """What the blocks at all anchors of one trajectory drafted.

    Attributes:
        drafts: (T, N) int64, argmax drafts.
        match: (T, N) bool, draft equals the trajectory's token there; False past its end.
        valid: (T, N) bool, the slot lies within the response.
        accept: (T, N) float64, probability that the trajectory's token was accepted at this slot
            (given that its block got there): 0 or 1 when greedy; 0 past the end.
        zero_target: Response tokens whose given log p is -inf: the target can't have drawn them, so
            the trajectory is not quite this target's. There min(1, q/p) is 1 if q > 0, else 0.
        reached: (T,) int64, tokens of each anchor's tree of drafts that were accepted, and
        nodes: (T,) int64, nodes of it within the response; None where there is one draft.
        confidence: (T, N) fp64, how sure the drafter is, where draft lengths are chosen; else None.
    """

    drafts: np.ndarray
    match: np.ndarray
    valid: np.ndarray
    accept: FloatArray
    zero_target: int = 0
    reached: np.ndarray | None = None
    nodes: np.ndarray | None = None
    confidence: FloatArray | None = None

    def cut(self, kept: np.ndarray) -> SlotResults:
        """Returns the results of drafts of which only the first `kept` (T,) slots are verified."""
        inside = np.arange(self.valid.shape[1]) < kept[:, None]
        return replace(
            self,
            match=self.match & inside,
            valid=self.valid & inside,
            accept=self.accept * inside,
        )


@dataclass(frozen=True)
class ResponseCounts:
    """Sums over the rounds of one response; expectations where acceptance is a probability.

    Attributes:
        emitted: Tokens emitted in rounds: response tokens - 1 (prefill emits the first).
        rounds: Target passes without prefill.
        accepted: Accepted drafted tokens.
        drafted: Drafted slots (of trees, nodes) within the response.
        unclipped: Sum of lengths in tau_unclipped's convention.
        per_response: Tokens per round of this response, emitted / rounds; 0 without a round. Where
            acceptance is a probability it is the mean of that ratio, which is larger than the ratio
            of means (by 4 % for 20 tokens at tau 2).
        accepted_at: (N,) rounds whose slot k was accepted.
        reached_at: (N,) rounds whose slots 1..k-1 were accepted and which drafted slot k.
        matched: Argmax drafts that equal the trajectory's token, over the rounds walked; of trees,
            accepted tokens too.
        wasted: Those of them that stand after their block's first error, or a tree's last accepted
            token.
        matched_all_anchors: As `matched`, over all anchors.
        wasted_all_anchors: As `wasted`, over all anchors. The real loop sees only its rounds'
            anchors, so both are nan there.
        visits: (T,) rounds whose anchor is the response's token t (probabilities in replay with a
            temperature).
        emitted_from: (T,) tokens emitted by those rounds.
        round_lengths: The lengths, where the walk is certain (greedy or thinned), else empty.
        round_accepted: Likewise, accepted drafted tokens of each round.
    """

    emitted: float
    rounds: float
    accepted: float
    drafted: float
    unclipped: float
    per_response: float
    accepted_at: FloatArray
    reached_at: FloatArray
    matched: float
    wasted: float
    matched_all_anchors: float = math.nan
    wasted_all_anchors: float = math.nan
    visits: FloatArray = field(default_factory=lambda: np.zeros(0))
    emitted_from: FloatArray = field(default_factory=lambda: np.zeros(0))
    round_lengths: tuple[int, ...] = ()
    round_accepted: tuple[int, ...] = ()


def count_rounds(slots: SlotResults) -> ResponseCounts:
    """Returns the sums over the rounds that these acceptances give, by one pass over positions.

    `visit[t]`, the probability that a round has its anchor at response position t, starts at
    visit[0] = 1 and flows on: from t, n accepts lead to t + n + 1. With acceptances of 0 and 1
    that is the walk of the real loop; else every sum is its exact expectation.

    Args:
        slots: Of one response.
    """
    last, drafted_slots = slots.accept.shape
    block_size = drafted_slots + 1
    # prefix[t, k]: slots 1..k of the block at t are accepted
    prefix = np.cumprod(np.concatenate([np.ones((last, 1)), slots.accept], axis=1), axis=1)
    # exactly[t, n]: slots 1..n are accepted and slot n + 1 is not (there may be none)
    exactly = prefix - np.concatenate([prefix[:, 1:], np.zeros((last, 1))], axis=1)
    visit = np.zeros(last + 1)
    visit[0] = 1.0
    unclipped, emitted_from = np.zeros(last), np.zeros(last)
    lengths: list[int] = []
    accepts: list[int] = []
    certain = bool(np.isin(slots.accept, (0.0, 1.0)).all())
    for t in np.arange(last):
        if visit[t] == 0.0:
            continue
        for n in np.flatnonzero(exactly[t]):
            after = min(t + n + 1, last)
            visit[after] += visit[t] * exactly[t, n]
            emitted_from[t] += visit[t] * exactly[t, n] * (after - t)
            length = unclipped_length(int(n), bool(t + n == last), block_size)
            unclipped[t] += exactly[t, n] * length
            if certain:
                lengths.append(int(after - t))
                accepts.append(int(n))
    visit_T1 = visit[:last, None]
    accepted_at = (visit_T1 * prefix[:, 1:]).sum(0)
    wasted_T, matched_T = waste_by_anchor(slots.match, slots.reached)
    nodes_T = slots.valid.sum(1) if slots.nodes is None else slots.nodes
    return ResponseCounts(
        emitted=float(last),
        rounds=float(visit_T1.sum()),
        accepted=float(accepted_at.sum()),
        drafted=float((visit[:last] * nodes_T).sum()),
        unclipped=float((visit[:last] * unclipped).sum()),
        per_response=last / len(lengths) if certain and last else mean_length(exactly),
        accepted_at=accepted_at,
        reached_at=(visit_T1 * prefix[:, :-1] * slots.valid).sum(0),
        matched=float((visit[:last] * matched_T).sum()),
        wasted=float((visit[:last] * wasted_T).sum()),
        matched_all_anchors=float(matched_T.sum()),
        wasted_all_anchors=float(wasted_T.sum()),
        visits=visit[:last],
        emitted_from=emitted_from,
        round_lengths=tuple(lengths),
        round_accepted=tuple(accepts),
    )


def mean_length(exactly: FloatArray) -> float:
    """Returns the expectation of (emitted tokens / rounds) over the random rounds of a response.

    The probability of standing at position t after g rounds flows on like `visit` above.

    Args:
        exactly: (T, K), probability that the block at position t accepts exactly n of its slots.

    Example:
        >>> mean_length(np.array([[0.5, 0.5], [1.0, 0.0]]))  # two tokens in two rounds or in one
        1.5
    """
    last, block_size = exactly.shape
    if last == 0:
        return 0.0
    # row i of the window: position t + i
    window = np.zeros((block_size + 1, last + 1))
    window[0, 0] = 1.0
    ended_G = np.zeros(last + 1)
    for t in range(last):
        moved = exactly[t, :, None] * window[0, :-1]
        room = min(block_size, last - 1 - t)
        window[1 : room + 1, 1:] += moved[:room]
        ended_G[1:] += moved[room:].sum(0)
        window[:-1] = window[1:]
        window[-1] = 0.0
    return float((ended_G[1:] * last / np.arange(1, last + 1)).sum())


def waste_by_anchor(
    match: np.ndarray, reached: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (T,) right drafts after the block's first error, and (T,) all right drafts.

    Args:
        match: (T, N) bool, draft equals the trajectory's token.
        reached: (T,) tokens of a tree that were accepted: these are right, and what is right in the
            argmax draft beyond them is wasted.

    Example:
        >>> waste_by_anchor(np.array([[True, False, True, True]]))
        (array([2]), array([3]))
    """
    if reached is not None:
        wasted_T = (match & (np.arange(match.shape[1]) >= reached[:, None])).sum(1)
        return wasted_T, wasted_T + reached
    matched_T = match.sum(1)
    kept_T = np.cumprod(match, axis=1).sum(1)
    return matched_T - kept_T, matched_T


def count_decoded(
    rounds: Sequence[Round],
    drafts: Sequence[Sequence[int]],
    response: Sequence[int],
    num_drafted: int | None = None,
    trees: Sequence[Sequence[int]] = (),
) -> ResponseCounts:
    """Returns the same sums for a response that the real loop made.

    Args:
        rounds: In order.
        drafts: Argmax draft tokens of each round (waste is theirs, whatever was verified); at most
            N, fewer from a drafter that stops early.
        response: The response's token ids.
        num_drafted: N; None for the length of the longest draft.
        trees: Of rounds that verified trees, their nodes' depths.
    """
    last = len(response) - 1
    block = max(map(len, drafts), default=0) if num_drafted is None else num_drafted
    accepted_at, reached_at = np.zeros(block), np.zeros(block)
    visits, emitted_from = np.zeros(last), np.zeros(last)
    matched = wasted = drafted = 0
    t = 0
    for number, (round_, draft) in enumerate(zip(rounds, drafts, strict=True)):
        room = min(len(draft), last - t)
        match = np.array([draft[k] == response[t + 1 + k] for k in range(room)], dtype=bool)
        reached, nodes = None, room
        if trees:
            reached = np.array([round_.accepted])
            nodes = sum(depth <= last - t for depth in trees[number])
        lost, right = waste_by_anchor(match[None], reached)
        wasted, matched, drafted = wasted + lost[0], matched + right[0], drafted + nodes
        accepted_at[: round_.accepted] += 1
        reached_at[: min(round_.accepted + 1, room)] += 1
        visits[t], emitted_from[t] = 1.0, round_.length
        t += round_.length
    return ResponseCounts(
        emitted=float(last),
        rounds=float(len(rounds)),
        accepted=float(sum(r.accepted for r in rounds)),
        drafted=float(drafted),
        unclipped=float(sum(r.unclipped for r in rounds)),
        per_response=last / len(rounds) if rounds else 0.0,
        accepted_at=accepted_at,
        reached_at=reached_at,
        matched=float(matched),
        wasted=float(wasted),
        visits=visits,
        emitted_from=emitted_from,
        round_lengths=tuple(r.length for r in rounds),
        round_accepted=tuple(r.accepted for r in rounds),
    )
