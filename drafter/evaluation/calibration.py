"""Finds the draft length that pays on this device: `evaluate.py calibrate`.

Legend: T anchors, N drafted slots, K block size, S tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from drafter.decoding import CachedDrafter, CachedTarget, Clock
from drafter.draft_length import Costs, DraftLength, calibrate, calibration_error, fit_costs
from drafter.errors import UserError
from drafter.evaluation.loading import LoadedDrafter
from drafter.evaluation.measure import FeatureStore, decode_prompt, slots_of
from drafter.evaluation.plots import pyplot, to_png
from drafter.evaluation.trajectories import Trajectory, TrajectorySettings
from drafter.rounds import SlotResults, count_rounds
from drafter.target import Target

THRESHOLDS = (0.0, *(round(0.02 * step, 2) for step in range(1, 46)))
REPEATS = 7
BY_HEAD, BY_PROBABILITY = "by its head", "max q"


@dataclass(frozen=True)
class Sweep:
    """What each threshold gives on the calibration prompts.

    Attributes:
        thresholds: Least likelihoods.
        accepted_length: Tokens a round.
        drafted: Verified draft tokens a round.
        tokens_per_second: By `Costs`; prefill left out.
    """

    thresholds: tuple[float, ...]
    accepted_length: tuple[float, ...]
    drafted: tuple[float, ...]
    tokens_per_second: tuple[float, ...]

    @property
    def best(self) -> int:
        """Place of the fastest."""
        return int(np.argmax(self.tokens_per_second))


def all_slots(
    loaded: LoadedDrafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
    progress: bool = False,
) -> list[SlotResults]:
    """Returns every block of every response, with the drafter's confidences.

    Args:
        loaded: Fits the target, and is on its device.
        target: That generated the trajectories.
        trajectories: To calibrate on.
        settings: They were generated under.
        progress: Show a bar.
    """
    drafter, found = loaded.drafter, []
    with tqdm(total=len(trajectories), desc="calibrating", disable=not progress) as bar:
        for batch in FeatureStore().each(target, trajectories, drafter.config.target_layer_ids):
            for place, states in batch:
                slots = slots_of(
                    drafter, target, trajectories[place], settings, states, length=DraftLength()
                )
                found.append(slots)
                bar.update()
    return [slots for slots in found if slots.confidence is not None]


def reached_slots(slots: Sequence[SlotResults]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns confidences, acceptances and weights of all slots, flattened.

    A slot's weight is the probability that a round reaches it: as decoding meets it.
    """
    parts = []
    for one in slots:
        assert one.confidence is not None
        visits_T1 = count_rounds(one).visits[:, None]
        before = np.cumprod(one.accept, axis=1)
        reach = np.concatenate([np.ones((len(before), 1)), before[:, :-1]], axis=1)
        weight = visits_T1 * reach * one.valid
        parts.append((one.confidence.ravel(), one.accept.ravel(), weight.ravel()))
    if not parts:
        raise UserError("no response has a second token, so there is nothing to calibrate on.")
    confidences, accepted, weights = zip(*parts, strict=True)
    return np.concatenate(confidences), np.concatenate(accepted), np.concatenate(weights)


def sweep(slots: Sequence[SlotResults], rule: DraftLength, costs: Costs) -> Sweep:
    """Returns what each of `THRESHOLDS` gives.

    Args:
        slots: Of the calibration prompts.
        rule: With its classes; its threshold does not matter.
        costs: Of this device.
    """
    rows = []
    for threshold in THRESHOLDS:
        own = replace(rule, threshold=threshold)
        emitted = rounds = drafted = 0.0
        for one in slots:
            counts = count_rounds(one.cut(own.kept(torch.from_numpy(one.confidence)).numpy()))
            emitted, rounds = emitted + counts.emitted, rounds + counts.rounds
            drafted += counts.drafted
        rate = emitted / costs.seconds(rounds, drafted)
        rows.append((threshold, emitted / rounds, drafted / rounds, rate))
    return Sweep(*(tuple(column) for column in zip(*rows, strict=True)))


@torch.no_grad()
def measure_costs(
    loaded: LoadedDrafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
) -> Costs:
    """Returns what a round takes here, by passes on the longest response.

    At a temperature, what drawing and deciding takes is counted by the round, not by the slot.

    Args:
        loaded: On the target's device.
        target: Likewise.
        trajectories: One with a second token at least.
        settings: Of them.
    """
    drafter, longest = loaded.drafter, max(trajectories, key=lambda one: len(one.ids))
    loop = decode_prompt(drafter, target, longest.prompt.ids, settings)  # warms up, too
    block_size = drafter.config.block_size
    # nothing below goes beyond what the target has run already
    prefix = longest.tokens[: max(1, longest.length - block_size - REPEATS)]
    engine = CachedTarget(target, drafter.config.target_layer_ids)
    engine.prefill(prefix)
    drafts = CachedDrafter(drafter, target, engine, DraftLength())  # its look at confidence counts
    drafts.draft(prefix[-1])  # encodes the prefix: later rounds encode what was accepted
    block = longest.tokens[-block_size:]
    drafting, tokens, seconds = [], sorted({1, 2, *range(4, block_size, 4), block_size}), []
    for _ in range(REPEATS):
        engine.verify(block[:1])
        engine.commit(1)
        drafting.append(_seconds(lambda: drafts.draft(block[0])))
    for count in tokens:
        times = []
        for _ in range(REPEATS):
            times.append(_seconds(lambda count=count: engine.verify(block[:count])))  # type: ignore[misc]
            engine.commit(0)
        seconds.append(statistics.median(times))
    bookkeeping = loop.seconds.get("bookkeeping", 0.0) / max(1, len(loop.rounds))
    return fit_costs(tokens, seconds, statistics.median(drafting) + bookkeeping)


def _seconds(work: Callable[[], Tensor]) -> float:
    clock = Clock()
    clock.lap("work", work())
    return clock.seconds["work"]


def find_draft_length(
    loaded: LoadedDrafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
    progress: bool = False,
) -> tuple[DraftLength, dict[str, Any], Sweep]:
    """Returns the rule that is fastest here, what it was found from, and all thresholds.

    Args:
        loaded: Fits the target, and is on its device.
        target: That generated the trajectories.
        trajectories: To calibrate on; not those that it is measured on later.
        settings: They were generated under.
        progress: Show a bar.

    Raises:
        UserError: No response has a second token.
    """
    slots = all_slots(loaded, target, trajectories, settings, progress)
    rule = DraftLength(0.0, *calibrate(*reached_slots(slots)))
    costs = measure_costs(loaded, target, trajectories, settings)
    found = sweep(slots, rule, costs)
    rule = replace(rule, threshold=found.thresholds[found.best])
    record = {
        "fingerprint": loaded.fingerprint,
        "block_size": loaded.drafter.config.block_size,
        "confidence": BY_HEAD if loaded.drafter.confidence_head else BY_PROBABILITY,
        "responses": len(slots),
        "sampling": asdict(settings.sampling),
        "costs": asdict(costs),
        "calibration_error": _errors(slots),
        "sweep": asdict(found),
    }
    return rule, record, found


def _errors(slots: Sequence[SlotResults]) -> dict[str, float]:
    """Returns how far confidence is off on every second response, calibrated on the others."""
    if len(slots) < 2:
        return {}
    fitted = DraftLength(0.0, *calibrate(*reached_slots(slots[::2])))
    seen = [torch.from_numpy(values) for values in reached_slots(slots[1::2])]
    return {
        "as it is": calibration_error(DraftLength(), *seen),
        "calibrated": calibration_error(fitted, *seen),
    }


def plot_calibration(rule: DraftLength, found: Sweep, by: str = BY_PROBABILITY) -> bytes:
    """Returns a PNG: what confidence is worth, and what each threshold gives.

    Args:
        rule: With its classes.
        found: The sweep over thresholds.
        by: What confidence is.
    """
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    edges = [0.0, *rule.bounds]
    left.stairs(rule.rates, edges, color="#4477aa", baseline=None, linewidth=2)
    left.plot([0, 1], [0, 1], ":", color="#bbbbbb")
    left.set_xlabel(f"drafter's confidence, {by}")
    left.set_ylabel("share accepted, once reached")
    right.plot(found.thresholds, found.tokens_per_second, color="#4477aa")
    best = found.best
    right.plot(found.thresholds[best], found.tokens_per_second[best], "o", color="#4477aa")
    right.set_xlabel("least likelihood of a slot")
    right.set_ylabel("tokens per second, predicted", color="#4477aa")
    other = right.twinx()
    other.plot(found.thresholds, found.drafted, color="#ee6677")
    other.set_ylabel("verified draft tokens a round", color="#ee6677")
    other.set_ylim(bottom=0)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines["top"].set_visible(False)
    return to_png(plt, fig)
