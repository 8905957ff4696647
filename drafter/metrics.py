"""torchmetrics over rounds: sums and counts only, so that ranks and batches add up exactly.

Legend: M blocks, N drafted slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from drafter.rounds import ResponseCounts


def prefix_match_lengths(correct_MN: Tensor, valid_MN: Tensor) -> Tensor:
    """Returns (M,) int64: how many leading slots are right.

    Example:
        >>> correct = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
        >>> prefix_match_lengths(correct, torch.ones_like(correct)).tolist()
        [2, 1, 0]
    """
    return (correct_MN & valid_MN).long().cumprod(-1).sum(-1)


class AcceptedLength(Metric):
    """Accepted length and its companions over responses (method.md, What is reported).

    `compute` returns a dict of 0-d float64 tensors:
        accepted_length: tokens per target pass, pooled over rounds, bonus included.
        accepted_length_per_response: mean over responses of each one's tokens per pass.
        accepted_per_round: accepted drafted tokens per round, counted, not accepted_length - 1.
        accepted_length_unclipped: see `drafter.verification.unclipped_length`.
        drafted_per_round: drafted slots per round.
        rounds, responses, responses_without_round: counts; a response of one token has no round.

    Example:
        >>> from drafter.rounds import SlotResults, count_rounds
        >>> import numpy as np
        >>> match = np.array([[True, True], [True, False], [False, False]])
        >>> slots = SlotResults(match * 1, match, ~np.tri(3, 2, -1).astype(bool)[::-1], match * 1.0)
        >>> metric = AcceptedLength()
        >>> metric.update(count_rounds(slots))
        >>> float(metric.compute()["accepted_length"])
        3.0
    """

    full_state_update = False
    _FIELDS = ("emitted", "rounds", "accepted", "drafted", "unclipped")

    def __init__(self) -> None:
        super().__init__()
        for name in (*self._FIELDS, "per_response", "responses", "responses_without_round"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, counts: ResponseCounts) -> None:
        """Adds one response."""
        self.responses += 1
        if counts.rounds == 0:
            self.responses_without_round += 1
            return
        for name in self._FIELDS:
            setattr(self, name, getattr(self, name) + getattr(counts, name))
        self.per_response += counts.per_response

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures; nan where nothing was counted."""
        with_round = self.responses - self.responses_without_round
        return {
            "accepted_length": self.emitted / self.rounds,
            "accepted_length_per_response": self.per_response / with_round,
            "accepted_per_round": self.accepted / self.rounds,
            "accepted_length_unclipped": self.unclipped / self.rounds,
            "drafted_per_round": self.drafted / self.rounds,
            "rounds": self.rounds,
            "responses": self.responses,
            "responses_without_round": self.responses_without_round,
        }


class AcceptanceByPosition(Metric):
    """P(slot k accepted | slots 1..k-1 accepted and slot k drafted), (N,) float64; nan if never.

    Args:
        num_drafted: N.
    """

    full_state_update = False

    def __init__(self, num_drafted: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_drafted, dtype=torch.float64)
        self.add_state("accepted", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("reached", zeros.clone(), dist_reduce_fx="sum")

    def update(self, counts: ResponseCounts) -> None:
        """Adds one response."""
        if counts.rounds:
            self.accepted += torch.as_tensor(counts.accepted_at, device=self.accepted.device)
            self.reached += torch.as_tensor(counts.reached_at, device=self.reached.device)

    def compute(self) -> Tensor:
        """Returns (N,)."""
        rate: Tensor = self.accepted / self.reached
        return rate


class WasteRatio(Metric):
    """Right argmax drafts thrown away by an earlier error of their block, of all right drafts.

    `compute` returns waste_ratio over the rounds walked (the main figure), waste_ratio_all_anchors
    over every anchor of the trajectories, and waste_ratio_of_drafted: the same numerator over all
    drafted tokens.
    """

    full_state_update = False
    _FIELDS = ("matched", "wasted", "matched_all_anchors", "wasted_all_anchors", "drafted")

    def __init__(self) -> None:
        super().__init__()
        for name in self._FIELDS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, counts: ResponseCounts) -> None:
        """Adds one response."""
        for name in self._FIELDS:
            setattr(self, name, getattr(self, name) + getattr(counts, name))

    def compute(self) -> dict[str, Tensor]:
        """Returns the three ratios; nan where nothing was right."""
        return {
            "waste_ratio": self.wasted / self.matched,
            "waste_ratio_all_anchors": self.wasted_all_anchors / self.matched_all_anchors,
            "waste_ratio_of_drafted": self.wasted / self.drafted,
        }
