"""What is counted of one response, in the plain form that result files hold.

Legend: N drafted slots, C context buckets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from drafter.evaluation.measure import MeasuredResponse
from drafter.rounds import ResponseCounts

CONTEXT_BOUNDS = (1024, 2048, 4096, 8192)
"""Upper bounds, in tokens of context at a round's anchor, of all buckets but the last."""

COUNTS = (
    "emitted",
    "rounds",
    "accepted",
    "drafted",
    "unclipped",
    "per_response",
    "matched",
    "wasted",
    "matched_all_anchors",
    "wasted_all_anchors",
)
PHASES = ("prefill", "draft", "verify", "bookkeeping")


@dataclass(frozen=True)
class Tally:
    """One response's counts.

    Attributes:
        set_name: Of its prompt.
        prompt_id: Likewise.
        turn: Likewise.
        prompt: 16 hex digits of a hash of the prompt's tokens.
        prompt_tokens: Context before the response, in tokens.
        response_tokens: With the first, which prefill emits.
        counts: The scalars of `ResponseCounts`, by name (`COUNTS`).
        accepted_at: (N,) see `ResponseCounts`.
        reached_at: (N,) see `ResponseCounts`.
        context_rounds: (C,) rounds by context length at their anchor.
        context_emitted: (C,) tokens that these emitted.
        round_lengths: Of the rounds that happened, or of one draw of them.
        seconds: Spent on it: `replay`; or the loop's `PHASES`, with `plain` for the target alone.
        plain_tokens: Tokens that the target alone emitted in `plain` seconds.
    """

    set_name: str
    prompt_id: int
    turn: int
    prompt: str
    prompt_tokens: int
    response_tokens: int
    counts: dict[str, float]
    accepted_at: list[float]
    reached_at: list[float]
    context_rounds: list[float]
    context_emitted: list[float]
    round_lengths: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    plain_tokens: int = 0

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells it from the other responses of a drafter."""
        return self.set_name, self.prompt_id, self.turn

    @property
    def prompt_place(self) -> tuple[str, int, int, str]:
        """As `place`, with the prompt itself: what must be equal to be compared."""
        return *self.place, self.prompt

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Tally:
        """Returns what `to_json` was made of; raises TypeError for anything else."""
        return cls(**row)


def tally(
    response: MeasuredResponse,
    seconds: dict[str, float],
    plain_tokens: int = 0,
) -> Tally:
    """Returns the counts of a measured response."""
    counts, prompt = response.counts, response.trajectory.prompt
    rounds, emitted = by_context(counts, len(prompt.ids))
    scalars = {name: float(getattr(counts, name)) for name in COUNTS}
    return Tally(
        prompt.set_name,
        prompt.prompt_id,
        prompt.turn,
        prompt.digest,
        len(prompt.ids),
        len(response.ids),
        # JSON has no nan: what the loop can't see is left out
        {name: value for name, value in scalars.items() if value == value},
        [float(value) for value in counts.accepted_at],
        [float(value) for value in counts.reached_at],
        rounds,
        emitted,
        list(response.drawn.round_lengths),
        seconds,
        plain_tokens,
    )


def by_context(counts: ResponseCounts, prompt_tokens: int) -> tuple[list[float], list[float]]:
    """Returns (C,) rounds and (C,) tokens they emitted, by tokens of context at their anchor.

    Args:
        counts: Of one response.
        prompt_tokens: Tokens before the response; an anchor at t has t more before it.
    """
    context = prompt_tokens + np.arange(len(counts.visits))
    bucket = np.searchsorted(np.array(CONTEXT_BOUNDS), context)
    size = len(CONTEXT_BOUNDS) + 1
    rounds = np.bincount(bucket, counts.visits, minlength=size)
    emitted = np.bincount(bucket, counts.emitted_from, minlength=size)
    return rounds.tolist(), emitted.tolist()
