"""Draft lengths: they change no text, replay counts their rounds, and the classes are calibrated.

The slow twins: isotonic regression by its min-max formula; every branch of the sampler.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluate
from drafter.draft_length import (
    Costs,
    DraftLength,
    calibrate,
    calibration_error,
    confidence,
    fit_costs,
    read_draft_length,
)
from drafter.errors import UserError
from drafter.evaluation.calibration import THRESHOLDS, reached_slots, sweep
from drafter.evaluation.measure import decode_prompt, replay_trajectory
from drafter.evaluation.results import merge, read_result
from drafter.evaluation.trajectories import EvalPrompt, Trajectory, TrajectorySettings
from drafter.rounds import SlotResults, count_rounds
from drafter.sampling import GREEDY, Sampling
from tests.test_verification_exact_laws import (
    PLAIN,
    WARPS,
    TableDrafter,
    acceptances,
    assert_same_law,
    draft_law,
    enumerate_loop,
    exact_texts,
    logits,
    slots_of,
    text_law,
)
from tests.tiny import tiny_target, tiny_target_dir
from tests.tiny_drafters import overfitted_drafter

NEW = 24
PROMPTS = [[7, 9, 6], [12, 8, 5, 30, 21], list(range(5, 25))]
HALF = DraftLength(0.5)
"""Over the tables: it keeps 0 to 3 slots of 3."""


class CutDrafter(TableDrafter):
    def draft(self, anchor_id):
        return HALF.cut(super().draft(anchor_id))


@pytest.mark.parametrize("sampling", WARPS, ids=str)
@pytest.mark.parametrize("rule", ["rejection", "rejection-argmax", "sample-and-match"])
def test_cut_drafts_write_the_targets_law(rule, sampling):
    runs = enumerate_loop(4, 4, rule, sampling, CutDrafter)
    assert_same_law(text_law(runs), exact_texts(4, sampling))
    kept = {len(draft) for _, decoded in runs for draft in decoded.drafts}
    assert min(kept) < 3
    assert len(kept) > 1
    assert any(round_.accepted for _, decoded in runs for round_ in decoded.rounds)


@pytest.mark.parametrize("sampling", [WARPS[0], WARPS[3]], ids=str)
def test_expectations_of_cut_rounds_are_the_loops(sampling):
    block_size, limit = 4, 5
    runs = enumerate_loop(block_size, limit, "rejection", sampling, CutDrafter)
    of_loop = np.zeros(3)
    for weight, decoded in runs:
        rounds = decoded.rounds
        drafted, at = 0, 1
        for round_, draft in zip(rounds, decoded.drafts, strict=True):
            drafted += min(len(draft), len(decoded.ids) - at)
            at += round_.length
        of_loop += weight * np.array([len(rounds), sum(r.accepted for r in rounds), drafted])
    expected = np.zeros(3)
    for text, p in exact_texts(limit, sampling).items():
        slots = slots_of(acceptances(text, block_size, sampling), block_size)
        rows = [
            logits([draft_law(text[: t + 1], k, PLAIN) for k in range(1, block_size)])
            for t in range(len(text) - 1)
        ]
        if rows:
            slots = slots.cut(HALF.kept(confidence(torch.stack(rows))).numpy())
        counts = count_rounds(slots)
        expected += float(p) * np.array([counts.rounds, counts.accepted, counts.drafted])
    np.testing.assert_allclose(expected, of_loop, atol=1e-9)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    target = tiny_target(tmp_path_factory.mktemp("target"), "llama")
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)]
    return target, overfitted_drafter(target, prompts, block_size=6, new_tokens=NEW, steps=25)


def rounds_of(setup, length, place):
    """The loop's result on a prompt, and replay's counts of the same text."""
    target, drafter = setup
    settings = TrajectorySettings(NEW, GREEDY, seed=4)
    prompt = EvalPrompt("s", place, PROMPTS[place])
    found = decode_prompt(drafter, target, prompt.ids, settings, key=prompt.key, length=length)
    row = torch.tensor([[*prompt.ids, *found.ids]])
    states = target.features(row, torch.zeros_like(row), drafter.config.target_layer_ids)
    replayed = replay_trajectory(
        drafter,
        target,
        Trajectory(prompt, found.ids, [], found.finished),
        settings,
        states.hidden_states,
        length=length,
    )
    return found, replayed.counts


@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_the_text_is_the_targets_own_and_replay_counts_the_same_rounds(setup, place):
    target, _ = setup
    (alone,) = target.generate([PROMPTS[place]], NEW)
    drafted = {}
    for threshold in (0.0, 0.6, 1.0):
        found, counts = rounds_of(setup, DraftLength(threshold), place)
        assert found.ids == alone.ids
        assert list(counts.round_lengths) == found.round_lengths
        assert list(counts.round_accepted) == [r.accepted for r in found.rounds]
        last, at = len(found.ids) - 1, 0
        room = 0
        for draft, length in zip(found.drafts, found.round_lengths, strict=True):
            room += min(len(draft), last - at)
            at += length
        assert counts.drafted == room
        drafted[threshold] = room / len(found.rounds)
    whole, _ = rounds_of(setup, None, place)
    all_slots, _ = rounds_of(setup, DraftLength(0.0), place)
    assert all_slots.round_lengths == whole.round_lengths
    assert drafted[0.6] < drafted[0.0]


def test_a_slot_is_kept_only_if_all_before_it_are():
    sure = torch.tensor([[0.9, 0.2, 1.0, 1.0], [1.0, 1.0, 0.55, 0.9], [0.1, 1.0, 1.0, 1.0]])
    assert DraftLength(0.5).kept(sure).tolist() == [1, 3, 0]
    assert DraftLength(0.0).kept(sure).tolist() == [4, 4, 4]
    calibrated = DraftLength(0.5, (0.5, 0.95, 1.0), (0.0, 0.3, 0.9))
    assert calibrated.kept(sure).tolist() == [0, 2, 0]
    assert calibrated.calibrated(torch.tensor([0.5, 0.51, 0.95, 1.0])).tolist() == [
        0.0,
        0.3,
        0.3,
        0.9,
    ]


def test_confidence_is_the_largest_probability():
    table = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(confidence(table), table.softmax(-1).amax(-1))


@pytest.mark.parametrize("seed", range(3))
def test_classes_are_the_isotonic_regression(seed):
    random = np.random.default_rng(seed)
    x = random.choice(np.linspace(0, 1, 15), size=40)
    y = (random.random(40) < x).astype(float)
    w = random.integers(0, 3, 40).astype(float)
    bounds, rates = calibrate(x, y, w)
    rule = DraftLength(0.0, bounds, rates)
    levels = np.array(sorted(set(x[w > 0])))
    weight = np.array([w[x == level].sum() for level in levels])
    mean = np.array([(w * y)[x == level].sum() for level in levels]) / weight
    # the min-max formula: max over beginnings of min over ends of the weighted mean between
    wanted = [
        max(
            min(np.average(mean[a : b + 1], weights=weight[a : b + 1]) for b in range(i, len(mean)))
            for a in range(i + 1)
        )
        for i in range(len(levels))
    ]
    found = rule.calibrated(torch.tensor(levels)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert list(rates) == sorted(rates)


def test_calibration_brings_the_error_down():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(4000, generator=generator, dtype=torch.float64)
    accepted = (torch.rand(4000, generator=generator) < sure**3).double()
    ones = torch.ones(4000, dtype=torch.float64)
    rule = DraftLength(0.0, *calibrate(*(t.numpy()[:2000] for t in (sure, accepted, ones))))
    rest = [t[2000:] for t in (sure, accepted, ones)]
    assert calibration_error(DraftLength(), *rest) > 0.2
    assert calibration_error(rule, *rest) < 0.05


def some_slots(seed=0, last=30, drafted=5):
    random = np.random.default_rng(seed)
    valid = np.arange(drafted) < (last - np.arange(last))[:, None]
    sure = random.random((last, drafted))
    match = (random.random((last, drafted)) < sure) & valid
    return SlotResults(
        np.zeros((last, drafted), np.int64), match, valid, match.astype(float), confidence=sure
    )


def test_reached_slots_are_those_of_the_rounds():
    slots = some_slots()
    counts = count_rounds(slots)
    _, accepted, weights = reached_slots([slots, slots])
    assert weights.sum() == 2 * counts.reached_at.sum()
    assert (weights * accepted).sum() == 2 * counts.accepted


def test_a_sweep_counts_each_threshold_and_finds_the_fastest():
    slots = [some_slots(seed) for seed in range(4)]
    dear, free = (sweep(slots, DraftLength(), Costs(1.0, slot)) for slot in (1.0, 0.0))
    assert dear.thresholds == THRESHOLDS
    assert list(dear.drafted) == sorted(dear.drafted, reverse=True)
    # where slots cost nothing all of them pay; where they cost as much as a round few do
    assert free.best == 0 or free.drafted[free.best] == free.drafted[0]
    assert dear.best > 0
    whole = [count_rounds(one) for one in slots]
    rounds = sum(one.rounds for one in whole)
    assert dear.accepted_length[0] == sum(one.emitted for one in whole) / rounds
    drafted = sum(one.drafted for one in whole)
    assert dear.tokens_per_second[0] == pytest.approx(120 / (rounds + drafted))


def test_costs_are_a_line_that_never_falls():
    costs = fit_costs([1, 4, 8, 16], [0.010, 0.013, 0.017, 0.025], draft=0.004)
    assert costs.slot == pytest.approx(0.001)
    assert costs.fixed == pytest.approx(0.014)
    assert costs.seconds(3, 10) == pytest.approx(3 * 0.014 + 10 * 0.001)
    assert fit_costs([1, 8], [0.02, 0.01], draft=0.0).slot == 0.0
    assert fit_costs([1, 2, 16], [0.001, 0.001, 0.1], draft=0.004).fixed == 0.004


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    path = tiny_target_dir(folder)
    target = tiny_target(folder)
    prompts = [EvalPrompt("x", i, ids) for i, ids in enumerate(PROMPTS)]
    overfitted_drafter(target, prompts, steps=30).save_pretrained(folder / "drafter")
    rows = [{"prompt": f"What is the sum of two and three? {i}"} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, path


def command(place, verb, *extra):
    folder, path = place
    evaluate.main(
        [
            *(verb, "--ckpt", str(folder / "drafter"), "--target", str(path), "--device", "cpu"),
            *("--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "12"),
            *("--cache-dir", str(folder / "cache"), "--no-progress", *extra),
        ]
    )


def test_a_rule_is_found_written_and_measured_beside_the_whole_draft(place, capsys):
    folder, _ = place
    rule_path = folder / "rule.json"
    command(place, "calibrate", "--output", str(rule_path))
    assert "tokens per second, predicted" in capsys.readouterr().out
    assert rule_path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(rule_path.read_text())
    assert content["responses"] == 4
    assert content["costs"]["fixed"] > 0
    rule, _ = read_draft_length(rule_path)
    assert rule.threshold in THRESHOLDS
    # a rule that surely cuts
    content |= {"threshold": 0.9, "bounds": [], "rates": []}
    rule_path.write_text(json.dumps(content))
    out = folder / "out.json"
    command(
        place, "report", "--mode", "both", "--draft-length", str(rule_path), "--output", str(out)
    )
    result = read_result(out)
    whole, cut = (one for one in result["drafters"] if one["path"])
    assert cut["name"] == f"{whole['name']}, draft while 0.9 likely"
    assert whole["draft_length"] is None
    assert json.loads(cut["draft_length"])["threshold"] == 0.9
    for mode in ("replay", "decode"):
        of = [one["figures"][mode]["average"] for one in (whole, cut)]
        drafted = [figures["drafted_per_round"]["value"] for figures in of]
        assert drafted[1] < drafted[0]
    assert [row["identical"] for row in result["agreement"]] == [4, 4]
    merged = merge([result, result])
    assert [one["name"] for one in merged["drafters"]] == [d["name"] for d in result["drafters"]]


def test_a_rule_is_for_the_drafter_that_it_was_found_for(place, capsys, tmp_path):
    path = tmp_path / "rule.json"
    command(place, "calibrate", "--output", str(path))
    command(place, "report", "--draft-length", str(path), "--temperature", "1")
    assert "was found for responses sampled in another way" in capsys.readouterr().out
    for wrong in ({"fingerprint": "of another"}, {"block_size": 3}):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(json.loads(path.read_text()) | wrong))
        with pytest.raises(SystemExit):
            command(place, "report", "--draft-length", str(other))
        assert "found for another drafter or block size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(place, "report", "--draft-length", str(path), "--audit")
    assert "--audit looks at whole drafts" in capsys.readouterr().err


def test_sampled_responses_calibrate_too(place):
    folder, _ = place
    rule_path = folder / "sampled.json"
    command(place, "calibrate", "--output", str(rule_path), "--temperature", "1")
    assert json.loads(rule_path.read_text())["sampling"]["temperature"] == 1.0


def test_no_rule_is_one_sentence(place, capsys, tmp_path):
    with pytest.raises(SystemExit):
        command(place, "report", "--draft-length", str(tmp_path / "none.json"))
    assert "evaluate.py calibrate makes it" in capsys.readouterr().err
    for content in ("{}", "[]", "no json", '{"format": 1, "bounds": ["x"], "rates": []}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match=r"is not what evaluate\.py calibrate writes"):
            read_draft_length(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"is not what evaluate\.py calibrate writes"):
        read_draft_length(tmp_path)
    with pytest.raises(UserError, match="nothing to calibrate on"):
        calibrate(np.zeros(2), np.zeros(2), np.zeros(2))
    for wrong in (
        {"threshold": 1.5},
        {"bounds": (1.0, 0.5), "rates": (0.1, 0.2)},
        {"bounds": (0.5,), "rates": (0.1,)},
        {"bounds": (1.0,), "rates": (1.2,)},
        {"bounds": (float("nan"), 1.0), "rates": (0.1, 0.2)},
    ):
        with pytest.raises(UserError):
            DraftLength(**wrong)


def test_a_sampled_replay_with_cut_drafts_needs_no_more_than_the_trajectory(setup):
    target, drafter = setup
    sampling = Sampling(1.0, top_k=8)
    settings = TrajectorySettings(NEW, sampling, seed=4)
    prompt = EvalPrompt("s", 0, PROMPTS[0])
    (drawn,) = target.generate([prompt.ids], NEW, sampling=sampling, seed=4)
    row = torch.tensor([[*prompt.ids, *drawn.ids]])
    states = target.features(row, torch.zeros_like(row), drafter.config.target_layer_ids)
    trajectory = Trajectory(prompt, drawn.ids, drawn.log_probs, False)
    whole, cut = (
        replay_trajectory(
            drafter, target, trajectory, settings, states.hidden_states, length=length
        ).counts
        for length in (None, DraftLength(0.5))
    )
    assert cut.rounds >= whole.rounds
    assert cut.drafted / cut.rounds < whole.drafted / whole.rounds
    assert cut.emitted == whole.emitted
