"""Intervals: against a slow bootstrap, against known coverage, and figures against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drafter.evaluation.intervals import (
    Estimate,
    average_figures,
    difference,
    draw_weights,
    estimate_figures,
    expanded_tail,
    interval,
    shared_prompts,
    verdict,
)
from drafter.evaluation.measure import DrafterMetrics, MeasuredResponse
from drafter.evaluation.results import compare, describe
from drafter.evaluation.tallies import CONTEXT_BOUNDS, Tally, by_context, tally
from drafter.evaluation.trajectories import EvalPrompt, Trajectory
from drafter.rounds import SlotResults, count_rounds

NUM_DRAFTED = 5
ZEROS = [0.0] * (len(CONTEXT_BOUNDS) + 1)


def responses(count, seed, share=0.6, sampled=False, turns=1, set_name="s"):
    """Returns MeasuredResponses over random acceptances, every turn of every prompt."""
    generator = np.random.default_rng(seed)
    out = []
    for prompt_id in range(count):
        for turn in range(turns):
            size = int(generator.integers(1, 40))
            valid = np.arange(1, NUM_DRAFTED + 1) + np.arange(size - 1)[:, None] < size
            match = (generator.random((size - 1, NUM_DRAFTED)) < share) & valid
            accept = generator.random(match.shape) * valid if sampled else match.astype(float)
            counts = count_rounds(SlotResults(match * 1, match, valid, accept))
            prompt = EvalPrompt(set_name, prompt_id, [1] * 7, turn=turn)
            trajectory = Trajectory(prompt, [1] * size, [], True)
            out.append(MeasuredResponse(trajectory, counts, counts, trajectory.ids))
    return out


def tallies(count, seed, **kwargs):
    return [tally(response, {}) for response in responses(count, seed, **kwargs)]


def changed(row, **counts):
    """Returns a tally with other counts."""
    return Tally(**{**row.to_json(), "counts": {**row.counts, **counts}})


@pytest.mark.parametrize("sampled", [False, True])
def test_figures_are_those_of_the_torchmetrics(sampled):
    measured = responses(12, seed=3, sampled=sampled)
    metrics = DrafterMetrics(NUM_DRAFTED)
    for response in measured:
        metrics.update(response.counts)
    expected = metrics.compute()
    found = estimate_figures([[tally(response, {}) for response in measured]], "s")
    for name in found.scalars:
        assert found.point[name] == pytest.approx(expected[name]), name
    assert found.point["accept_rate"] == pytest.approx(expected["accept_rate"], nan_ok=True)
    assert found.responses == expected["responses"]


def slow_bootstrap(runs, weights_S, weights_P, numerator, denominator):
    """One resample, by drawing responses one by one."""
    top = bottom = 0.0
    for run, run_weight in zip(runs, weights_S, strict=True):
        for row in run:
            for _ in range(int(run_weight * weights_P[row.prompt_id])):
                top += row.counts[numerator]
                bottom += row.counts[denominator]
    return top / bottom if bottom else np.nan


@pytest.mark.parametrize("turns", [1, 2])
def test_draws_are_those_of_a_bootstrap_over_prompts_and_runs(turns):
    runs = [tallies(8, seed=seed, turns=turns) for seed in (1, 2, 3)]
    found = estimate_figures(runs, "s", resamples=40, seed=9)
    weights_S, weights_P = draw_weights(3, 8, "s", 40, 9)
    for name, pair in {
        "accepted_length": ("emitted", "rounds"),
        "waste_ratio": ("wasted", "matched"),
    }.items():
        expected = [slow_bootstrap(runs, s, p, *pair) for s, p in zip(weights_S, weights_P)]  # noqa: B905
        np.testing.assert_allclose(found.draws[name], expected)
    assert weights_P.sum(1) == pytest.approx(np.full(40, 8))


@pytest.mark.parametrize("prompts", [6, 12, 60])
def test_intervals_hold_the_truth_about_as_often_as_they_say(prompts):
    """Ratios of sums, many times over: near 95 % of the intervals hold the truth."""
    generator = np.random.default_rng(0)
    hits, repeats = 0, 300
    for repeat in range(repeats):
        rounds = generator.integers(5, 30, size=prompts)
        emitted = rounds * 2.0 + generator.normal(0, 6, size=prompts)
        rows = [
            Tally("s", i, 0, "", 1, 1, {"emitted": e, "rounds": float(r)}, [], [], [], [])
            for i, (e, r) in enumerate(zip(emitted, rounds, strict=True))
        ]
        found = estimate_figures([rows], "s", resamples=500, seed=repeat)
        estimate = found.estimate("accepted_length")
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.915 <= hits / repeats <= 0.98


def test_the_tail_of_few_prompts_is_that_of_students_t():
    """Against t quantiles from tables."""
    for prompts, t in ((5, 2.776), (10, 2.262), (31, 2.042)):
        z = t * math.sqrt(prompts / (prompts - 1))
        assert expanded_tail(prompts) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=0.1)


def test_pairing_tells_apart_what_the_intervals_alone_do_not():
    base = tallies(30, seed=5)
    better = [
        Tally(
            **{**row.to_json(), "counts": {**row.counts, "emitted": row.counts["emitted"] * 1.05}}
        )
        for row in base
    ]
    a, b = (estimate_figures([rows], "s") for rows in (better, base))
    assert a.estimate("accepted_length").low < b.estimate("accepted_length").high
    found = difference(a, b, "accepted_length")
    assert found.low > 0
    assert verdict(found, 30) == "better"
    assert verdict(difference(b, a, "accepted_length"), 30) == "worse"
    assert verdict(difference(a, a, "accepted_length"), 30) == "not told apart"


def test_only_prompts_that_both_have_are_compared():
    a, b = tallies(6, seed=1), tallies(9, seed=2)
    (first,), (second,) = shared_prompts([a[1:]], [b])
    assert [row.prompt_id for row in first] == [row.prompt_id for row in second] == [1, 2, 3, 4, 5]
    rows = compare([a[1:]], [b])
    assert {row["prompts"] for row in rows} == {5}
    assert compare([a[:1]], [b[1:]]) == []


def test_less_waste_is_better():
    wasteful, thrifty = tallies(20, seed=1, share=0.5), tallies(20, seed=1, share=0.5)
    thrifty = [
        Tally(**{**row.to_json(), "counts": {**row.counts, "wasted": 0.0}}) for row in thrifty
    ]
    (row,) = (
        r for r in compare([thrifty], [wasteful]) if (r["figure"], r["set"]) == ("waste_ratio", "s")
    )
    assert row["difference"]["value"] < 0
    assert row["verdict"] == "better"


def test_the_average_weighs_sets_alike_whatever_their_size():
    small, large = tallies(3, seed=1, set_name="a"), tallies(50, seed=2, set_name="b")
    found = describe([small + large])
    values = [found["sets"][name]["accepted_length"]["value"] for name in ("a", "b")]
    assert found["average"]["accepted_length"]["value"] == pytest.approx(np.mean(values))
    both = average_figures(
        estimate_figures([rows], name) for name, rows in (("a", small), ("b", large))
    )
    assert both.responses == 53


def test_nothing_counted_gives_no_number_rather_than_a_wrong_one():
    one_token = [tally(r, {}) for r in responses(60, seed=11) if len(r.ids) == 1]
    assert one_token
    found = estimate_figures([one_token], "s")
    estimate = found.estimate("accepted_length")
    assert np.isnan(estimate.value)
    assert np.isnan(estimate.low)
    assert interval(1.0, np.array([np.nan, 2.0]), 9).low == 2.0
    assert verdict(Estimate(0.0, float("nan"), float("nan")), 9) == "not told apart"


def test_rounds_are_told_apart_by_their_anchors_context():
    (response,) = responses(1, seed=4)
    counts = response.counts
    total = counts.rounds, counts.emitted
    start = CONTEXT_BOUNDS[0] - 3  # anchors 0..3 stand within the first bound
    rounds, emitted = by_context(counts, start)
    assert (sum(rounds), sum(emitted)) == pytest.approx(total)
    assert rounds[0] == counts.visits[:4].sum()
    assert rounds[1] == counts.visits[4:].sum()
    assert len(rounds) == len(CONTEXT_BOUNDS) + 1


def test_a_run_is_the_same_drafter_on_every_set():
    """With the same effect of a seed on all sets, averaging over sets narrows nothing."""
    runs = []
    for level in (2.0, 2.5, 3.0):
        counts = {"emitted": level, "rounds": 1.0}
        runs.append(
            [
                Tally(name, i, 0, "", 1, 1, counts, [], [], ZEROS, ZEROS)
                for name in "abcdef"
                for i in range(20)
            ]
        )
    found = describe(runs)
    one, average = found["sets"]["a"]["accepted_length"], found["average"]["accepted_length"]
    assert average["high"] - average["low"] == pytest.approx(one["high"] - one["low"], abs=0.02)
    assert one["high"] - one["low"] > 0.5


def test_one_prompt_has_no_interval_and_no_verdict():
    base = tallies(1, seed=5)
    better = [changed(row, emitted=row.counts["emitted"] * 1.2) for row in base]
    assert np.isnan(estimate_figures([base], "s").estimate("accepted_length").low)
    assert {row["verdict"] for row in compare([better], [base])} == {"not told apart"}
    many = tallies(30, seed=2, set_name="t")
    assert np.isnan(describe([base + many])["average"]["accepted_length"]["low"])


def test_a_paired_average_is_over_the_sets_that_both_have_the_figure_on():
    shared = tallies(9, seed=1, set_name="x")
    a = shared + tallies(9, seed=2, set_name="y")
    b = shared + [changed(row, matched=0.0, wasted=0.0) for row in a if row.set_name == "y"]
    (row,) = (r for r in compare([a], [b]) if (r["figure"], r["set"]) == ("waste_ratio", "average"))
    assert row["difference"]["value"] == 0
    assert row["verdict"] == "not told apart"
