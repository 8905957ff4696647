"""Figures with 95 % intervals: bootstrap over prompts (and over runs, where there are several).

Prompts are what is drawn anew, with all turns of their conversation; pooled figures are ratios of
sums. Two drafters are compared on the same draws of the same prompts, so that what is easy or hard
about a prompt cancels out.

Legend: R resamples, S runs (seeds), P prompts, N drafted slots.
Sources: Efron & Tibshirani (1993), percentile intervals; Hesterberg (2015), their expansion for
small samples; method.md, What is reported.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drafter.evaluation.tallies import COUNTS, PHASES, Tally

RESAMPLES = 2000
Z_95 = 1.959964
LEAST_PROMPTS = 6
"""Fewer say nothing: five coins fall alike every sixteenth time."""
Array = np.ndarray
Runs = Sequence[Sequence[Tally]]
"""One sequence of responses for every run of a recipe; a single drafter is one run."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; nan where nothing was counted."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """All figures of some responses, each with what it was in every resample.

    Attributes:
        point: By name, () or (N,).
        draws: By name, (R,) or (R, N).
        prompts: P.
        responses: How many, over all runs.
        least: Fewest prompts of any set in it.
    """

    point: dict[str, Array]
    draws: dict[str, Array]
    prompts: int
    responses: int
    least: int

    def estimate(self, name: str, position: int | None = None) -> Estimate:
        """Returns a figure's value and interval; `position` for those that have N."""
        value, draws = self.point[name], self.draws[name]
        if position is not None:
            value, draws = value[position], draws[:, position]
        return interval(float(value), draws, self.prompts if self.least > 1 else self.least)

    @property
    def scalars(self) -> list[str]:
        """Names of the figures that are one number."""
        return [name for name, value in self.point.items() if value.ndim == 0]


def interval(value: float, draws: Array, prompts: int) -> Estimate:
    """Returns the expanded percentile interval around a value; nan draws do not count.

    Args:
        value: Of the figure.
        draws: (R,) of it.
        prompts: P that it was made of. With few, plain percentiles are too narrow; they are taken
            further out, as far as Student's t is from the normal (Hesterberg 2015).
    """
    finite = draws[np.isfinite(draws)]
    if not len(finite) or prompts < 2:  # one prompt says nothing of how prompts differ
        return Estimate(value, np.nan, np.nan)
    tail = 100 * expanded_tail(prompts)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def expanded_tail(prompts: int) -> float:
    """Returns the share of draws beyond either end of a 95 % interval.

    Example:
        >>> round(expanded_tail(1000), 4), round(expanded_tail(10), 4), expanded_tail(2)
        (0.0248, 0.0086, 0.0)
    """
    if prompts < 4:
        return 0.0
    z, degrees = Z_95, prompts - 1
    # t's quantile by its expansion in 1 / degrees of freedom
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return 0.5 * math.erfc(t * math.sqrt(prompts / degrees) / math.sqrt(2))


def estimate_figures(
    runs: Runs, set_name: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Figures:
    """Returns the figures of one prompt set.

    Args:
        runs: Responses of every run; all runs have the same prompts.
        set_name: With the seed, the key of the draws: every drafter gets the same ones.
        resamples: R.
        seed: Of the draws.
    """
    prompts = sorted({(t.set_name, t.prompt_id) for tallies in runs for t in tallies})
    fields = {
        name: np.stack([_by_prompt(tallies, prompts, read) for tallies in runs])
        for name, read in _FIELDS.items()
    }
    ones_S, ones_P = np.ones((1, len(runs))), np.ones((1, len(prompts)))
    weights_S, weights_P = draw_weights(len(runs), len(prompts), set_name, resamples, seed)
    point = _figures({name: _sum(ones_S, ones_P, values) for name, values in fields.items()})
    draws = _figures({name: _sum(weights_S, weights_P, v) for name, v in fields.items()})
    return Figures(
        {name: value[0] for name, value in point.items()},
        draws,
        len(prompts),
        sum(map(len, runs)),
        len(prompts),
    )


def draw_weights(
    runs: int, prompts: int, set_name: str, resamples: int, seed: int
) -> tuple[Array, Array]:
    """Returns (R, S) and (R, P): how often each run and each prompt is drawn in every resample.

    A run is the same drafter on every set, so runs are drawn alike for all sets; prompts are drawn
    for each on its own. A single run is kept as it is: one draw does not show its randomness.
    """
    key = [seed, zlib.crc32(set_name.encode())]
    weights_P = np.random.default_rng([*key, 0]).multinomial(
        prompts, np.full(prompts, 1 / prompts), size=resamples
    )
    weights_S = np.random.default_rng([seed, 1]).multinomial(
        runs, np.full(runs, 1 / runs), size=resamples
    )
    return weights_S.astype(float), weights_P.astype(float)


def average_figures(sets: Iterable[Figures]) -> Figures:
    """Returns the unweighted mean over prompt sets, of each figure over the sets that have it."""
    sets = list(sets)
    shared = [name for name in sets[0].scalars if all(name in other.point for other in sets)]
    having = {name: [s for s in sets if np.isfinite(s.point[name])] or sets for name in shared}
    return Figures(
        {name: np.mean([s.point[name] for s in own]) for name, own in having.items()},
        {name: np.mean([s.draws[name] for s in own], axis=0) for name, own in having.items()},
        sum(s.prompts for s in sets),
        sum(s.responses for s in sets),
        min(s.least for s in sets),
    )


def difference(a: Figures, b: Figures, name: str) -> Estimate:
    """Returns a - b with its paired interval; both must come from the same prompts and draws."""
    assert a.prompts == b.prompts
    prompts = a.prompts if a.least > 1 else a.least
    return interval(float(a.point[name] - b.point[name]), a.draws[name] - b.draws[name], prompts)


def verdict(difference: Estimate, prompts: int) -> str:
    """Returns "better" or "worse"; "not told apart" where the interval holds 0 or prompts are few.

    Example:
        >>> verdict(Estimate(0.3, 0.1, 0.5), 30), verdict(Estimate(0.3, -0.1, 0.7), 30)
        ('better', 'not told apart')
        >>> verdict(Estimate(0.3, 0.1, 0.5), 3)
        'not told apart'
    """
    if prompts < LEAST_PROMPTS:
        return "not told apart"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not told apart"


def shared_prompts(a: Runs, b: Runs) -> tuple[Runs, Runs]:
    """Returns both drafters' responses to the prompts that every run of both has measured."""
    everyone = [{tally.prompt_place for tally in run} for run in (*a, *b)]
    both = set.intersection(*everyone) if everyone else set()
    return (
        [[tally for tally in run if tally.prompt_place in both] for run in a],
        [[tally for tally in run if tally.prompt_place in both] for run in b],
    )


def _by_prompt(
    tallies: Sequence[Tally],
    prompts: Sequence[tuple[str, int]],
    read: Callable[[Tally], Sequence[float]],
) -> Array:
    """Returns (P, F): the sums of a field over each prompt's turns."""
    rows: dict[tuple[str, int], list[Array]] = {}
    for tally in tallies:
        rows.setdefault((tally.set_name, tally.prompt_id), []).append(
            np.asarray(read(tally), dtype=float)
        )
    width = max((len(row) for found in rows.values() for row in found), default=0)
    out = np.zeros((len(prompts), width))
    for place, prompt in enumerate(prompts):
        for row in rows.get(prompt, []):
            out[place, : len(row)] += row
    return out


def _sum(weights_S: Array, weights_P: Array, values_SPF: Array) -> Array:
    """Returns (R, F)."""
    summed: Array = np.einsum("rs,rp,spf->rf", weights_S, weights_P, values_SPF, optimize=True)
    return summed


def _count(name: str) -> Callable[[Tally], Sequence[float]]:
    return lambda tally: [tally.counts.get(name, 0.0)]


def _phase(name: str) -> Callable[[Tally], Sequence[float]]:
    return lambda tally: [tally.seconds.get(name, 0.0)]


_FIELDS: Mapping[str, Callable[[Tally], Sequence[float]]] = {
    **{name: _count(name) for name in COUNTS},
    **{f"seconds_{name}": _phase(name) for name in (*PHASES, "plain", "replay")},
    "accepted_at": lambda tally: tally.accepted_at,
    "reached_at": lambda tally: tally.reached_at,
    "context_rounds": lambda tally: tally.context_rounds,
    "context_emitted": lambda tally: tally.context_emitted,
    "responses": lambda tally: [1.0],
    "with_round": lambda tally: [float(tally.counts["rounds"] > 0)],
    "tokens": lambda tally: [float(tally.response_tokens)],
    "plain_tokens": lambda tally: [float(tally.plain_tokens)],
}


def _figures(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Returns figures (R,) or (R, N) of summed fields (R, F): method.md, What is reported."""
    one = {name: values[:, 0] for name, values in sums.items() if values.shape[1]}
    loop = sum(one[f"seconds_{phase}"] for phase in PHASES)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {
            "accepted_length": one["emitted"] / one["rounds"],
            "accepted_length_per_response": one["per_response"] / one["with_round"],
            "accepted_per_round": one["accepted"] / one["rounds"],
            "accepted_length_unclipped": one["unclipped"] / one["rounds"],
            "drafted_per_round": one["drafted"] / one["rounds"],
            "waste_ratio": one["wasted"] / one["matched"],
            "waste_ratio_all_anchors": one["wasted_all_anchors"] / one["matched_all_anchors"],
            "waste_ratio_of_drafted": one["wasted"] / one["drafted"],
            "accept_rate": sums["accepted_at"] / sums["reached_at"],
            "accepted_length_by_context": sums["context_emitted"] / sums["context_rounds"],
        }
        if np.any(loop):
            out["tokens_per_second"] = one["tokens"] / loop
            out["ms_prefill"] = 1e3 * one["seconds_prefill"] / one["responses"]
            for phase in PHASES[1:]:
                out[f"ms_{phase}"] = 1e3 * one[f"seconds_{phase}"] / one["rounds"]
        if np.any(one["seconds_plain"]):
            out["tokens_per_second_plain"] = one["plain_tokens"] / one["seconds_plain"]
            out["speedup"] = out["tokens_per_second"] / out["tokens_per_second_plain"]
        if np.any(one["seconds_replay"]):
            out["ms_replay_per_token"] = 1e3 * one["seconds_replay"] / one["tokens"]
    return out
