"""Result files: responses' counts with the figures made of them. Versioned; partial ones merge.

The form is described in docs/results-format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from drafter.errors import UserError
from drafter.evaluation.intervals import (
    RESAMPLES,
    Estimate,
    Figures,
    Runs,
    average_figures,
    difference,
    estimate_figures,
    shared_prompts,
    verdict,
)
from drafter.evaluation.tallies import CONTEXT_BOUNDS, Tally

FORMAT = 2
AVERAGE = "average"
COMPARED = ("accepted_length", "waste_ratio", "speedup")
SAME = ("target", "settings", "dtype")
"""What result files must share to be merged."""


def summarise(result: dict[str, Any], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Returns the result with figures, comparisons and tables made anew from its responses.

    Args:
        result: With `drafters`, each with `responses` by mode (tallies as plain values).
        resamples: Of the bootstrap.
    """
    comparisons: list[dict[str, Any]] = []
    for mode in ("replay", "decode"):
        by_drafter: dict[str, Runs] = {}
        for drafter in result["drafters"]:
            rows = drafter["responses"].get(mode)
            if not rows:
                drafter.get("figures", {}).pop(mode, None)
                continue
            runs = [[Tally.from_json(row) for row in rows]]
            by_drafter[drafter["name"]] = runs
            drafter.setdefault("figures", {})[mode] = describe(runs, resamples)
        comparisons += [
            {"mode": mode, "a": a, "b": b, **row}
            for a, b in combinations(by_drafter, 2)
            for row in compare(by_drafter[a], by_drafter[b], resamples)
        ]
    return {**result, "format": FORMAT, "comparisons": comparisons}


def describe(runs: Runs, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Returns all figures of a drafter (or of several runs of one recipe): by set, and on average.

    Args:
        runs: Responses of every run.
        resamples: Of the bootstrap.
    """
    sets = _by_set(runs)
    figures = {name: estimate_figures(own, name, resamples=resamples) for name, own in sets.items()}
    return {
        "sets": {name: _plain(found) for name, found in figures.items()},
        AVERAGE: _plain(average_figures(figures.values())),
        "by_context": _by_context(runs),
        "by_turn": _by_turn(runs),
    }


def compare(a: Runs, b: Runs, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """Returns paired differences a - b with a verdict, by set and on average.

    Args:
        a: Responses of every run of one recipe.
        b: Of the other; only prompts that both have measured count.
        resamples: Of the bootstrap.
    """
    a, b = shared_prompts(a, b)
    sets_a, sets_b = _by_set(a), _by_set(b)
    if not sets_a:
        return []
    figures = {
        name: (
            estimate_figures(sets_a[name], name, resamples=resamples),
            estimate_figures(sets_b[name], name, resamples=resamples),
        )
        for name in sets_a
    }
    pairs = {
        **figures,
        AVERAGE: (
            average_figures(first for first, _ in figures.values()),
            average_figures(second for _, second in figures.values()),
        ),
    }
    rows = []
    for name, (first, second) in pairs.items():
        for figure in COMPARED:
            if figure not in first.point or figure not in second.point:
                continue
            found = difference(first, second, figure)
            word = verdict(found, first.prompts)
            if figure == "waste_ratio" and word in ("better", "worse"):  # less of it is better
                word = {"better": "worse", "worse": "better"}[word]
            rows.append(
                {
                    "set": name,
                    "figure": figure,
                    "difference": asdict(found),
                    "verdict": word,
                    "prompts": first.prompts,
                }
            )
    return rows


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one result of several partial ones; of a response in two, the later file's counts.

    A drafter is known by its fingerprint, whatever it is called.

    Raises:
        UserError: They are of different targets or settings.
    """
    first = results[0]
    for other in results[1:]:
        for key in SAME:
            if other[key] != first[key]:
                raise UserError(
                    f"these result files do not belong together: {key} is {first[key]} in one and "
                    f"{other[key]} in another."
                )
    drafters: dict[str, dict[str, Any]] = {}
    for result in results:
        for drafter in result["drafters"]:
            known = drafters.setdefault(
                drafter["fingerprint"], {**drafter, "responses": {}, "samples": []}
            )
            for mode, rows in drafter["responses"].items():
                places = {_place(row): row for row in known["responses"].get(mode, [])}
                places |= {_place(row): row for row in rows}
                known["responses"][mode] = list(places.values())
            samples = {_where(sample): sample for sample in known["samples"]}
            samples |= {_where(sample): sample for sample in drafter.get("samples", [])}
            known["samples"] = list(samples.values())
    names: list[str] = []
    for drafter in drafters.values():
        n = names.count(drafter["name"]) + 1
        names.append(drafter["name"])
        drafter["name"] += f" ({n})" if n > 1 else ""
    merged = {**results[-1], "drafters": list(drafters.values())}
    for key in ("skipped", "misfits", "audit", "agreement"):
        found: list[Any] = []
        for result in results:
            found += [row for row in result.get(key) or [] if row not in found]
        merged[key] = found
    return merged


def read_result(path: Path) -> dict[str, Any]:
    """Returns a result file's content.

    Raises:
        UserError: It is missing, not JSON, or of another version.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file.") from error
    except ValueError as error:
        raise UserError(f"{path} is not a result file: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else None
        raise UserError(f"{path} is not a result file of format {FORMAT} (it says {found}).")
    return result


def without_nan(value: Any) -> Any:
    """Returns a JSON-like value with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(figures: Figures) -> dict[str, Any]:
    out: dict[str, Any] = {"prompts": figures.prompts, "responses": figures.responses}
    out |= {name: asdict(figures.estimate(name)) for name in figures.scalars}
    if "accept_rate" in figures.point:
        count = len(figures.point["accept_rate"])
        out["accept_rate"] = [asdict(figures.estimate("accept_rate", k)) for k in range(count)]
    return out


def _by_set(runs: Runs) -> dict[str, Runs]:
    names = sorted({tally.set_name for tallies in runs for tally in tallies})
    return {
        name: [[tally for tally in tallies if tally.set_name == name] for tallies in runs]
        for name in names
    }


def _by_context(runs: Runs) -> list[dict[str, Any]]:
    """Accepted length by context length, pooled over all sets."""
    tallies = [tally for run in runs for tally in run]
    rows = []
    for bucket, bound in enumerate((*CONTEXT_BOUNDS, None)):
        rounds = sum(tally.context_rounds[bucket] for tally in tallies)
        emitted = sum(tally.context_emitted[bucket] for tally in tallies)
        if rounds:
            rows.append({"up_to": bound, "rounds": rounds, "accepted_length": emitted / rounds})
    return rows


def _by_turn(runs: Runs) -> list[dict[str, Any]]:
    """Accepted length by turn, for every set with more than one."""
    rows = []
    for name, own in _by_set(runs).items():
        turns = sorted({tally.turn for run in own for tally in run})
        for turn in turns if len(turns) > 1 else []:
            chosen = [[tally for tally in run if tally.turn == turn] for run in own]
            found: Estimate = estimate_figures(chosen, name).estimate("accepted_length")
            rows.append({"set": name, "turn": turn + 1, "accepted_length": asdict(found)})
    return rows


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["set_name"], row["prompt_id"], row["turn"]


def _where(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    return sample["set_name"], sample["prompt_id"], sample.get("mode")


def names_of(result: Mapping[str, Any], mode: str) -> Iterable[str]:
    """Returns the prompt sets that any drafter was measured on in this mode."""
    found: dict[str, None] = {}
    for drafter in result["drafters"]:
        for name in drafter.get("figures", {}).get(mode, {}).get("sets", {}):
            found[name] = None
    return found
