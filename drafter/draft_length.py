"""How many slots of a draft are worth the target's time.

Legend: T anchors, N drafted slots, V vocabulary.

A block-diffusion drafter fills all N slots in one pass, so stopping early saves nothing of the
draft. It saves verification: the target runs one token less for each slot that is left out. A slot
is worth it while its chance to be reached and accepted is above what its verification costs, in
tokens: a threshold, where that cost is the same for every slot.

How sure the drafter is of a slot its confidence head says (`drafter.model`), if it has one, and
else its largest probability there, max_v q(v).

The decision reads the block's states or marginals and never a token that was drawn from them: a
draft is cut before it is drawn, so verification of what is left is exact as ever. (To cut at a
token because of what was drawn there would favour the target's other tokens.)
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafter.errors import UserError
from drafter.files import write_atomic
from drafter.model import Drafter

FORMAT = 1
CLASSES = 50
"""Classes of confidence, of equal weight, before neighbours out of order are pooled."""


@dataclass(frozen=True)
class DraftLength:
    """Keeps a slot while it is likely that all slots up to it are accepted.

    The likelihood of slot k is the product over j <= k of the calibrated confidence of slot j, the
    share of slots of its class that were accepted once they were reached.

    Args:
        threshold: Least likelihood, 0 to 1; 0 keeps all slots.
        bounds: Ascending upper ends of the classes of confidence, the last of them at least 1; none
            takes confidence as it is.
        rates: Share accepted in each class.

    Raises:
        UserError: Out of these ranges.

    Example:
        >>> rule = DraftLength(0.6, bounds=(0.5, 1.0), rates=(0.4, 0.8))
        >>> rule.kept(torch.tensor([[0.9, 0.6, 0.9], [0.3, 0.9, 0.9]])).tolist()
        [2, 0]
    """

    threshold: float = 0.0
    bounds: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"a draft length's threshold is {self.threshold}; give 0 to 1.")
        ends = (0.0, *self.bounds)
        ordered = all(low <= high for low, high in pairwise(ends))  # false for nan
        if len(self.bounds) != len(self.rates) or not ordered or (self.bounds and ends[-1] < 1):
            raise UserError("a draft length's classes must ascend to 1, with a rate for each.")
        if not all(0 <= rate <= 1 for rate in self.rates):
            raise UserError("a draft length's rates must lie between 0 and 1.")

    @property
    def label(self) -> str:
        """In tables, and in the keys of what is kept.

        Example:
            >>> DraftLength(0.25).label
            'draft while 0.25 likely'
        """
        return f"draft while {self.threshold:g} likely"

    @property
    def key(self) -> str:
        """All of it, as text."""
        return json.dumps(asdict(self))

    def calibrated(self, confidence: Tensor) -> Tensor:
        """Returns shares accepted (fp64) of confidences of any shape."""
        if not self.bounds:
            return confidence.double()
        bounds, rates = _on_device(self.bounds[:-1], self.rates, confidence.device)
        return rates[torch.bucketize(confidence.double(), bounds)]

    def kept(self, confidence_TN: Tensor) -> Tensor:
        """Returns how many slots (T,) are kept, of confidences (T, N)."""
        likely_TN = self.calibrated(confidence_TN).cumprod(-1)
        return (likely_TN >= self.threshold).to(torch.int64).cumprod(-1).sum(-1)

    def cut(self, logits_NV: Tensor, confidence_N: Tensor | None = None) -> Tensor:
        """Returns the logits of the slots that are kept; by their largest probabilities if None."""
        sure_N = confidence(logits_NV) if confidence_N is None else confidence_N
        return logits_NV[: int(self.kept(sure_N[None]))]


@functools.lru_cache(maxsize=8)
def _on_device(
    bounds: tuple[float, ...], rates: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns both in fp64; kept, since decoding asks for them in every round."""
    first, second = (torch.tensor(v, dtype=torch.float64, device=device) for v in (bounds, rates))
    return first, second


def confidence(logits: Tensor) -> Tensor:
    """Returns max_v q(v) (...,) in fp32 of logits (..., V), at temperature 1."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def confidence_of(drafter: Drafter, states: Tensor, logits: Tensor) -> Tensor:
    """Returns how sure a drafter is of slots (...,), from 0 to 1.

    Args:
        drafter: The unwrapped drafter.
        states: (..., D) of the slots, as the target's head reads them.
        logits: (..., V) made of them.
    """
    head = drafter.confidence_head
    return confidence(logits) if head is None else head(states).sigmoid()


@dataclass(frozen=True)
class Costs:
    """What a round takes on one device: `fixed` seconds, and `slot` seconds a verified draft token.

    `fixed` holds the drafter's pass, the anchor's share of verification, and all bookkeeping.
    """

    fixed: float
    slot: float

    def seconds(self, rounds: float, drafted: float) -> float:
        """Returns what so many rounds with so many drafted tokens in all take."""
        return self.fixed * rounds + self.slot * drafted


def fit_costs(tokens: Sequence[int], seconds: Sequence[float], draft: float) -> Costs:
    """Returns a line through measured times of verification (least squares, never falling).

    Args:
        tokens: Of a target pass, the anchor included.
        seconds: It took.
        draft: Seconds of the drafter's pass.

    Example:
        >>> fit_costs([1, 3, 5], [0.01, 0.014, 0.018], draft=0.005)
        Costs(fixed=0.015, slot=0.002)
    """
    x, y = np.asarray(tokens, float) - 1, np.asarray(seconds, float)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-12))
    slope = max(0.0, slope)
    at_none = max(0.0, float(y.mean() - slope * x.mean()))
    return Costs(round(draft + at_none, 12), round(slope, 12))


def calibrate(
    confidences: np.ndarray, accepted: np.ndarray, weights: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns bounds and rates of a non-falling step function (pool adjacent violators).

    Args:
        confidences: Of slots that were reached.
        accepted: Whether each was accepted, or the probability.
        weights: Of each, 0 or more.

    Raises:
        UserError: No slot has weight.

    Example:
        >>> low, high = [0.2] * 4, [0.8] * 4
        >>> calibrate(np.array(low + high), np.array([0, 0, 0, 1, 1, 1, 0, 1]), np.ones(8))
        ((0.2, 1.0), (0.25, 0.75))
    """
    used = weights > 0
    if not used.any():
        raise UserError("no drafted slot was reached, so there is nothing to calibrate on.")
    order = np.argsort(confidences[used], kind="stable")
    x, y, w = (values[used][order].astype(float) for values in (confidences, accepted, weights))
    place = np.minimum((np.cumsum(w) / w.sum() * CLASSES).astype(int), CLASSES - 1)
    # equal confidences stay in one class
    place = np.maximum.accumulate(place[np.searchsorted(x, x, side="right") - 1])
    pooled: list[list[float]] = []  # upper end, weight, weighted sum of accepted
    for one in np.unique(place):
        here = place == one
        pooled.append([x[here].max(), w[here].sum(), (w[here] * y[here]).sum()])
        while len(pooled) > 1 and pooled[-2][2] * pooled[-1][1] >= pooled[-1][2] * pooled[-2][1]:
            end, weight, total = pooled.pop()
            pooled[-1] = [end, pooled[-1][1] + weight, pooled[-1][2] + total]
    bounds = tuple(float(end) for end, _, _ in pooled)
    rates = tuple(min(1.0, float(total / weight)) for _, weight, total in pooled)
    return (*bounds[:-1], 1.0), rates


def calibration_error(rule: DraftLength, confidences: Tensor, accepted: Tensor, w: Tensor) -> float:
    """Returns sum abs(rate - mean calibrated confidence) over ten classes, by weight.

    Args:
        rule: Whose `calibrated` is looked at.
        confidences: Of slots that were reached.
        accepted: Probability of each that it was accepted.
        w: Weight of each.
    """
    said = rule.calibrated(confidences)
    place = (said * 10).long().clamp(max=9)
    total = 0.0
    for one in range(10):
        here = place == one
        if float(w[here].sum()) > 0:
            total += abs(float((w[here] * (accepted[here] - said[here])).sum()))
    return total / float(w.sum()) if float(w.sum()) > 0 else math.nan


def read_draft_length(path: Path) -> tuple[DraftLength, dict[str, Any]]:
    """Returns the rule that `evaluate.py calibrate` has written, and all that is beside it.

    Raises:
        UserError: It is missing, or something else.
    """
    try:
        content: Any = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is no object of format {FORMAT}")
        bounds, rates = (tuple(map(float, content[name])) for name in ("bounds", "rates"))
        rule = DraftLength(float(content["threshold"]), bounds, rates)
        _ = content["fingerprint"], content["block_size"], content["sampling"]
        return rule, content
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; evaluate.py calibrate makes it.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not what evaluate.py calibrate writes: {reason}") from error


def write_draft_length(rule: DraftLength, path: Path, record: dict[str, Any]) -> None:
    """Writes a rule, and how it was found."""
    write_atomic(path, json.dumps({"format": FORMAT, **asdict(rule), **record}, indent=1) + "\n")
