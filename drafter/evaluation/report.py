"""Measures drafters side by side on the same prompts; gives one result with all of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from drafter.errors import UserError
from drafter.evaluation.asked import asked_rows
from drafter.evaluation.audit import Auditor, Divergence
from drafter.evaluation.loading import LoadedDrafter, check_fits
from drafter.evaluation.measure import FeatureStore
from drafter.evaluation.measured_sets import PROMPT_LOOKUP, Bench, Measured, by_set
from drafter.evaluation.rates import Rates
from drafter.evaluation.results import FORMAT, summarise
from drafter.evaluation.trajectories import (
    EvalPrompt,
    Skipped,
    Trajectory,
    TrajectorySettings,
    generate_conversations,
    kept_trajectories,
)
from drafter.target import Target

Mode = Literal["replay", "decode", "both"]


class FollowUps(Protocol):
    """What makes the next turns of a conversation (data.prompt_sets.FollowUps)."""

    skipped: list[Skipped]

    def has_next(self, prompt: EvalPrompt) -> bool:
        """Returns whether the user says more after this prompt's reply."""
        ...

    def __call__(self, trajectory: Trajectory) -> EvalPrompt | None:
        """Returns the next turn's prompt, or None."""
        ...


@dataclass(frozen=True)
class ReportSettings:
    """How drafters are measured.

    Args:
        trajectories: Limit, sampling and seed.
        mode: `replay`, `decode` (the real loop, timed), or `both`, which also holds them together.
        audit: Decode greedily with and without each drafter, and explain every divergence.
        batch_size: Prompts answered together.
        folder: Where trajectories and measurements are kept; None keeps nothing.
        fresh: Measure again what is kept.
        feature_budget_gb: Target features kept between drafters, in GB.
        progress: Show bars.
    """

    trajectories: TrajectorySettings
    mode: Mode = "replay"
    audit: bool = False
    batch_size: int = 32
    folder: Path | None = None
    fresh: bool = False
    feature_budget_gb: float = 4.0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.audit and not self.trajectories.sampling.greedy:
            raise UserError("--audit compares greedy texts; leave --temperature at 0.")

    @property
    def replays(self) -> bool:
        """Whether rounds are read off trajectories."""
        return self.mode in ("replay", "both")

    @property
    def decodes(self) -> bool:
        """Whether the real loop runs."""
        return self.mode in ("decode", "both") or self.audit


@dataclass
class Prepared:
    """Prompts of all turns, and the trajectories that belong to them."""

    prompts: list[EvalPrompt]
    trajectories: list[Trajectory]
    seconds: float = 0.0
    skipped: list[Skipped] = field(default_factory=list)


def report(
    drafters: Sequence[LoadedDrafter],
    target: Target,
    prompts: Sequence[EvalPrompt],
    follow_up: FollowUps,
    settings: ReportSettings,
    features: FeatureStore | None = None,
) -> dict[str, Any]:
    """Returns every drafter's responses and figures on every prompt set and on their average.

    `prompts` are the rows of asked.asked_rows, which a result file has beside it, not in it.

    Args:
        drafters: Measured on the same trajectories; those that don't fit the target are left out.
        target: Of all of them.
        prompts: First turns, of one or more sets.
        follow_up: Makes the next turns.
        settings: How.
        features: Kept from one call to the next; None for a store of this call's own.

    Raises:
        UserError: No drafter fits the target, or an audit at a temperature.
    """
    fitting, misfits = sort_by_fit(drafters, target)
    prepared = prepare(target, prompts, follow_up, settings)
    measuring = settings.folder and settings.folder / "measured"
    bench = Bench(
        target,
        settings.trajectories,
        measuring,
        settings.fresh,
        settings.progress,
        features=features or FeatureStore(int(settings.feature_budget_gb * 1e9)),
    )
    found: dict[str, dict[str, Measured]] = {}
    if settings.replays:
        for loaded in fitting:
            found.setdefault(loaded.name, {})["replay"] = bench.replay(
                loaded, prepared.trajectories
            )
    if settings.decodes:
        for name, measured in bench.decode(fitting, prepared.prompts).items():
            found.setdefault(name, {})["decode"] = measured
    others = {loaded.name for loaded in fitting if not loaded.plain}
    for name, modes in found.items():
        for mode, measured in modes.items() if name not in others else ():
            Rates(settings.folder, target).put(mode, measured.new_seconds, measured.new_tokens)
    result = {
        "format": FORMAT,
        "mode": settings.mode,
        "settings": asdict(settings.trajectories),
        "batch_size": settings.batch_size,
        "target": {"path": target.path, "fingerprint": target.fingerprint},
        "dtype": str(target.dtype).removeprefix("torch."),
        "trajectories": {
            "responses": len(prepared.trajectories),
            "tokens": sum(len(trajectory.ids) for trajectory in prepared.trajectories),
            "seconds": prepared.seconds,
        },
        "skipped": [asdict(entry) for entry in prepared.skipped],
        "misfits": misfits,
        "prompts": asked_rows(
            prepared.prompts,
            prepared.trajectories,
            {
                place: ids
                for modes in found.values()
                if "decode" in modes
                for place, ids in modes["decode"].plain_ids.items()
            },
        ),
        "drafters": [
            _drafter_entry(name, modes, {loaded.name: loaded for loaded in fitting})
            for name, modes in found.items()
        ],
    }
    if settings.decodes and settings.trajectories.sampling.greedy:
        result |= _hold_together(bench, fitting, prepared, found, settings)
    return summarise(result)


def prepare(
    target: Target,
    prompts: Sequence[EvalPrompt],
    follow_up: FollowUps,
    settings: ReportSettings,
) -> Prepared:
    """Returns the prompts of all turns with the target's responses, generated where needed.

    Without replay, only responses that stand in a next turn's context are generated.
    """
    folder = settings.folder and settings.folder / "trajectories"
    kept = folder and kept_trajectories(
        target, prompts, settings.trajectories, folder, settings.batch_size
    )
    begun = time.perf_counter()
    asked, trajectories = generate_conversations(
        target,
        prompts,
        settings.trajectories,
        follow_up,
        wanted=lambda prompt: settings.replays or follow_up.has_next(prompt),
        folder=folder,
        batch_size=settings.batch_size,
        progress=settings.progress,
    )
    seconds = time.perf_counter() - begun
    tokens = sum(len(trajectory.ids) for trajectory in trajectories)
    if trajectories:
        print(
            f"trajectories: {len(trajectories)} responses, {tokens} tokens in {seconds:.1f} s",
            flush=True,
        )
    if not kept:
        Rates(settings.folder, target).put("generate", seconds, tokens)
    return Prepared(asked, trajectories, seconds, list(follow_up.skipped))


def sort_by_fit(
    drafters: Sequence[LoadedDrafter], target: Target
) -> tuple[list[LoadedDrafter], list[str]]:
    """Returns the drafters that fit the target, and why others do not.

    Raises:
        UserError: None fits.
    """
    fitting: list[LoadedDrafter] = []
    misfits: list[str] = []
    for loaded in drafters:
        try:
            check_fits(loaded, target)
        except UserError as error:
            misfits.append(str(error))
            continue
        fitting.append(loaded)
    if not fitting:
        raise UserError(misfits[0] if misfits else "there is no drafter to measure.")
    return fitting, misfits


def _drafter_entry(
    name: str, modes: dict[str, Measured], loaded: dict[str, LoadedDrafter]
) -> dict[str, Any]:
    drafter = loaded.get(name)
    slots = max(len(t.accepted_at) for measured in modes.values() for t in measured.tallies)
    entry: dict[str, Any] = {
        "name": name,
        "path": drafter.path if drafter else None,
        "fingerprint": drafter.fingerprint if drafter else PROMPT_LOOKUP,
        "block_size": slots + 1,
        "search": drafter.search.label if drafter and drafter.search else None,
        "draft_length": drafter.length.key if drafter and drafter.length else None,
        "responses": {},
        "samples": [],
        "seconds": {},
    }
    for mode, measured in modes.items():
        rows = sorted(measured.tallies, key=lambda tally: tally.place)
        entry["responses"][mode] = [tally.to_json() for tally in rows]
        entry["samples"] += [{**asdict(sample), "mode": mode} for sample in measured.samples]
        entry["seconds"][mode] = measured.new_seconds
    return entry


def _hold_together(
    bench: Bench,
    drafters: Sequence[LoadedDrafter],
    prepared: Prepared,
    found: dict[str, dict[str, Measured]],
    settings: ReportSettings,
) -> dict[str, Any]:
    """Compares greedy paths: the loop with the target alone (audit), and with replay."""
    out: dict[str, Any] = {}
    places = {(p.set_name, p.prompt_id, p.turn): p for p in prepared.prompts}
    trajectories = {
        (t.prompt.set_name, t.prompt.prompt_id, t.prompt.turn): t for t in prepared.trajectories
    }
    groups = {
        (group[0].prompt.set_name, group[0].prompt.turn): group
        for group in by_set(prepared.trajectories)
    }
    for loaded in drafters:
        decoded = found[loaded.name]["decode"]
        replayed = (
            {t.place: t for t in found[loaded.name]["replay"].tallies} if settings.replays else {}
        )
        if not loaded.plain:  # counted; what explains a difference looks at one draft
            if settings.replays:
                alike = [
                    t.round_lengths == replayed[t.place].round_lengths for t in decoded.tallies
                ]
                out.setdefault("agreement", []).append(_counted(loaded.name, alike))
            continue
        model = loaded.drafter.to(device=bench.target.device, dtype=bench.target.dtype)
        auditor = Auditor(
            bench.target,
            model,
            settings.trajectories,
            prepared.prompts,
            settings.batch_size,
            bench.anchors_per_chunk,
        )
        if settings.audit:
            texts = [
                auditor.compare_texts(places[place], ids, decoded.plain_ids[place])
                for place, ids in decoded.ids.items()
            ]
            out.setdefault("audit", []).append(_verdicts(loaded.name, texts))
        if settings.replays:
            rounds = [
                auditor.compare_rounds(
                    trajectories[tally.place],
                    decoded.ids[tally.place],
                    tally.round_lengths,
                    replayed[tally.place].round_lengths,
                    groups[tally.set_name, tally.turn],
                )
                for tally in decoded.tallies
            ]
            out.setdefault("agreement", []).append(_verdicts(loaded.name, rounds))
    return out


def _counted(name: str, alike: Sequence[bool]) -> dict[str, Any]:
    """As `_verdicts`, where nothing is explained."""
    return {
        **_verdicts(name, [None] * len(alike)),
        "identical": sum(alike),
        "unexplained": len(alike) - sum(alike),
    }


def _verdicts(name: str, divergences: Sequence[Divergence | None]) -> dict[str, Any]:
    parted = [divergence for divergence in divergences if divergence is not None]
    return {
        "drafter": name,
        "responses": len(divergences),
        "identical": len(divergences) - len(parted),
        "explained": sum(divergence.explained for divergence in parted),
        "unexplained": sum(not divergence.explained for divergence in parted),
        "divergences": [asdict(divergence) for divergence in parted],
    }
