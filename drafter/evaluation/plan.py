"""What an evaluation will do, how long and how large at most, before anything is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from drafter.evaluation.loading import LoadedDrafter
from drafter.evaluation.measured_sets import Bench
from drafter.evaluation.rates import Rates
from drafter.evaluation.report import FollowUps, ReportSettings
from drafter.evaluation.trajectories import EvalPrompt, generate_trajectories, kept_trajectories
from drafter.target import Target

BYTES_PER_TOKEN = 6
"""Of a trajectory file: a token id in JSON (twenty more where sampled, for its log-probability)."""
BYTES_PER_RESPONSE = 1600
"""Of a journal, per response and contender."""
GUESSED_BANDWIDTH = {"cuda": 1e12, "cpu": 1e10}
"""Bytes a second at which weights are read, where nothing was ever measured on this device."""
GUESSED_PASS_SECONDS = {"cuda": 0.02, "cpu": 0.01}
"""What a pass costs at least: launches and Python."""


def plan(
    drafters: Sequence[LoadedDrafter],
    target: Target,
    prompts: Sequence[EvalPrompt],
    follow_up: FollowUps,
    settings: ReportSettings,
) -> list[str]:
    """Returns what `report` would do with the same arguments, a line each; nothing is generated.

    Args:
        drafters: That fit the target.
        target: Of all of them.
        prompts: First turns.
        follow_up: Makes the next turns.
        settings: How.
    """
    rates = Rates(settings.folder, target)
    most = settings.trajectories.max_new_tokens
    lines = [f"target: {target.path}, {target.dtype} on {target.device}"]
    later = sum(follow_up.has_next(prompt) for prompt in prompts)
    for name, count in Counter(prompt.set_name for prompt in prompts).items():
        lines.append(f"prompts: {name} {count}")
    lines.append(f"turns: {len(prompts)} first, {later} that follow (at least)")
    turns = len(prompts) + later
    asked = [p for p in prompts if settings.replays or follow_up.has_next(p)]
    folder = settings.folder and settings.folder / "trajectories"
    kept = 0
    if folder:
        kept = kept_trajectories(target, asked, settings.trajectories, folder, settings.batch_size)
    generate = len(asked) - kept + (later if settings.replays and kept < len(asked) else 0)
    seconds = generate * most * _generation_rate(rates, target, settings.batch_size)
    lines.append(
        f"trajectories: {kept} of {len(asked)} first turns are kept, {generate} responses to "
        f"generate, {clock(seconds)}"
    )
    disk = generate * most * BYTES_PER_TOKEN * (1 if settings.trajectories.sampling.greedy else 4)
    pass_seconds = _pass_seconds(target)
    for loaded in drafters if settings.replays else ():
        missing = turns
        if folder and kept == len(asked):
            found = generate_trajectories(
                target,
                asked,
                settings.trajectories,
                folder=folder,
                batch_size=settings.batch_size,
                progress=False,
            )
            measured = folder.parent / "measured"
            bench = Bench(target, settings.trajectories, measured, settings.fresh)
            missing = bench.missing(loaded, found) + later
        own = missing * most * (rates.get("replay") or pass_seconds / 40)
        seconds += own
        disk += missing * BYTES_PER_RESPONSE
        lines.append(f"replay: {loaded.name}, {missing} responses (at most), {clock(own)}")
    if settings.decodes:
        contenders = len(drafters) + 2
        rate = rates.get("decode") or pass_seconds * contenders
        own = turns * most * rate
        seconds += own
        disk += turns * BYTES_PER_RESPONSE * contenders
        lines.append(
            f"decode: {turns} responses by each drafter, prompt lookup and the target alone, "
            f"{clock(own)}"
        )
    guessed = "" if rates.get("generate") else "; a guess, nothing was measured here yet"
    lines.append(f"at most {clock(seconds)} and {disk / 1e6:.1f} MB of disk in all{guessed}")
    return lines


def clock(seconds: float) -> str:
    """Returns a duration for people.

    Example:
        >>> clock(42.4), clock(700), clock(9000)
        ('42 s', '12 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _pass_seconds(target: Target) -> float:
    device = target.device.type
    size = sum(p.numel() * p.element_size() for p in target.model.parameters())
    bandwidth = GUESSED_BANDWIDTH.get(device, GUESSED_BANDWIDTH["cpu"])
    return float(size / bandwidth + GUESSED_PASS_SECONDS.get(device, 0.01))


def _generation_rate(rates: Rates, target: Target, batch_size: int) -> float:
    return rates.get("generate") or _pass_seconds(target) / max(1, batch_size / 2)
