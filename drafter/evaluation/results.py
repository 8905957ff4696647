"""Result files: responses' counts with the figures made of them. Versioned; partial ones merge.

The form is described in docs/results-format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
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
from drafter.evaluation.measured_sets import PROMPT_LOOKUP
from drafter.evaluation.tallies import CONTEXT_BOUNDS, Tally

FORMAT = 2
AVERAGE = "average"
COMPARED = ("accepted_length", "waste_ratio", "speedup")
PROMPT_BOUNDS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Ends of the classes of prompt length that figures are given for, in tokens."""
SAME = ("settings", "dtype")
"""What result files must share to be merged, beside the target."""
AT_SIZE = " @ K "
"""In a row's name, before a block size that it was not trained at."""
KNOWN_BY = ("fingerprint", "block_size", "search", "draft_length")
"""What tells drafters of several result files apart."""
REQUIRED = ("settings", "dtype", "target", "drafters", "skipped", "misfits")


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
        "by_prompt_length": _by_prompt_length(runs),
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
    rows = []
    for name in (*figures, AVERAGE):
        for figure in COMPARED:
            both = [pair for pair in figures.values() if _both_have(pair, figure)]
            if name != AVERAGE:
                both = [figures[name]] if _both_have(figures[name], figure) else []
            if not both:
                continue
            first = average_figures(pair[0] for pair in both)
            second = average_figures(pair[1] for pair in both)
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


def _both_have(pair: tuple[Figures, Figures], figure: str) -> bool:
    return all(math.isfinite(own.point.get(figure, math.nan)) for own in pair)


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one result of several partial ones; of a response in two, the later file's counts.

    A drafter is known by `KNOWN_BY`, whatever it is called.

    Raises:
        UserError: They are of different targets, settings or prompts, or were timed on different
            devices.
    """
    _check_mergeable(results)
    drafters: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for drafter in result["drafters"]:
            known = drafters.setdefault(
                tuple(drafter.get(key) for key in KNOWN_BY),
                {**drafter, "responses": {}, "samples": [], "names": []},
            )
            known["names"].append(drafter["name"])
            for mode, rows in drafter["responses"].items():
                places = {_place(row): row for row in known["responses"].get(mode, [])}
                places |= {_place(row): row for row in rows}
                known["responses"][mode] = list(places.values())
            samples = {_where(sample): sample for sample in known["samples"]}
            samples |= {_where(sample): sample for sample in drafter.get("samples", [])}
            known["samples"] = list(samples.values())
    taken: list[str] = []
    renamed: dict[str, str] = {}
    for drafter in drafters.values():
        n = taken.count(drafter["name"]) + 1
        taken.append(drafter["name"])
        drafter["name"] += f" ({n})" if n > 1 else ""
        renamed |= dict.fromkeys(drafter.pop("names"), drafter["name"])
    merged = {**results[-1], "drafters": list(drafters.values())}
    for key in ("skipped", "misfits", "audit", "agreement"):
        found: list[Any] = []
        for result in results:
            for row in result.get(key) or []:
                if key in ("audit", "agreement"):
                    row = {**row, "drafter": renamed.get(row["drafter"], row["drafter"])}
                found += [row] if row not in found else []
        merged[key] = found
    merged["overlap"] = {}
    for result in results:
        for name, sets in (result.get("overlap") or {}).items():
            name = renamed.get(name, name)
            known = merged["overlap"].get(name)
            both = isinstance(known, dict) and isinstance(sets, dict)
            merged["overlap"][name] = {**known, **sets} if both else sets
    merged["command"] = "; ".join(dict.fromkeys(str(result.get("command")) for result in results))
    return merged


def _check_mergeable(results: Sequence[dict[str, Any]]) -> None:
    first = results[0]
    prompts: dict[tuple[Any, ...], str] = {}
    devices = set()
    for result in results:
        there = {key: result[key] for key in SAME}
        there["target"] = result["target"]["fingerprint"]
        asked = {key: first[key] for key in SAME}
        asked["target"] = first["target"]["fingerprint"]
        for key, value in there.items():
            if value != asked[key]:
                raise UserError(
                    f"these result files do not belong together: {key} is {asked[key]} in one and "
                    f"{value} in another."
                )
        for drafter in result["drafters"]:
            for mode, rows in drafter["responses"].items():
                if mode == "decode" and rows:
                    devices.add(result.get("device_name"))
                for row in rows:
                    if prompts.setdefault(_place(row), row["prompt"]) != row["prompt"]:
                        raise UserError(
                            "these result files do not belong together: prompt "
                            f"{row['prompt_id']} of set {row['set_name']!r} is another prompt in "
                            "another file; name the sets apart."
                        )
    if len(devices) > 1:
        raise UserError(
            "these result files hold timings of different devices ("
            f"{', '.join(sorted(map(str, devices)))}); merge those of one."
        )


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
    lacking = [key for key in REQUIRED if key not in result]
    if lacking:
        raise UserError(f"{path} is not a whole result file: it lacks {', '.join(lacking)}.")
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
    figures = estimate_figures(runs, "all sets")
    rows = []
    for bucket, bound in enumerate((*CONTEXT_BOUNDS, None)):
        having = [tally for tally in tallies if tally.context_rounds[bucket]]
        if having:
            found = figures.estimate("accepted_length_by_context", bucket)
            prompts = len({(tally.set_name, tally.prompt_id) for tally in having})
            rounds = sum(tally.context_rounds[bucket] for tally in having)
            row = {"up_to": bound, "prompts": prompts, "rounds": rounds}
            rows.append({**row, "accepted_length": asdict(found)})
    return rows


def _by_prompt_length(runs: Runs) -> list[dict[str, Any]]:
    """Accepted length by tokens of context before the response, pooled over all sets."""
    rows = []
    for low, high in pairwise((0, *PROMPT_BOUNDS, math.inf)):
        own = [[t for t in run if low < t.prompt_tokens <= high] for run in runs]
        prompts = len({(t.set_name, t.prompt_id) for run in own for t in run})
        if prompts:
            found = estimate_figures(own, "all sets").estimate("accepted_length")
            row = {"up_to": high if high < math.inf else None, "prompts": prompts}
            rows.append({**row, "accepted_length": asdict(found)})
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


def by_block_size(result: Mapping[str, Any], mode: str) -> dict[str, dict[int, Any]]:
    """Returns the average accepted length by row and block size in decoding.

    Empty where every row was decoded at the block size that it was trained at.
    """
    found: dict[str, dict[int, Any]] = {}
    for drafter in result["drafters"]:
        figures = drafter.get("figures", {}).get(mode)
        if figures:
            name = drafter["name"].rsplit(AT_SIZE, 1)[0]
            average = figures[AVERAGE]["accepted_length"]
            found.setdefault(name, {})[drafter["block_size"]] = average
    return found if any(len(own) > 1 for own in found.values()) else {}


def by_search(result: Mapping[str, Any], mode: str) -> dict[str, dict[str, list[Any]]]:
    """Returns averages by drafter and way to draft, from few to many drafted tokens a round.

    The ways: `one draft`, `tree`, `self-select`. Empty where no drafter was searched in two sizes.
    Left out: what has no drafted tokens a round, for its set had no round.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for drafter in result["drafters"]:
        figures = drafter.get("figures", {}).get(mode)
        if figures and not drafter.get("draft_length") and drafter["fingerprint"] != PROMPT_LOOKUP:
            label = drafter.get("search")
            way = (
                "one draft" if not label else "tree" if label.startswith("tree") else "self-select"
            )
            name = drafter["name"].removesuffix(f", {label}")
            average = figures[AVERAGE]
            drafted = average.get("drafted_per_round", {}).get("value")
            if drafted is not None and math.isfinite(drafted):
                found.setdefault(name, {}).setdefault(way, []).append(average)
    for ways in found.values():
        for averages in ways.values():
            averages.sort(key=lambda own: own["drafted_per_round"]["value"])
    several = any(len(averages) > 1 for ways in found.values() for averages in ways.values())
    return found if several else {}
