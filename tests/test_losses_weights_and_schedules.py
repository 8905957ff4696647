"""Switching terms off, schedules, breakdown, extra terms, settings out of a checkpoint."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from losses import Chain, CombinedLoss, PositionalCrossEntropy, Schedule, WeightedTerm
from tests import losses_twins as twins

LENGTHS = (5, 0, 2, 4, 1)


def scores_of(seed=0, dtype=torch.float32):
    return twins.random_scores(LENGTHS, 5, seed, dtype)


def test_zero_weights_give_bit_for_bit_the_loss_without_the_terms():
    scores = scores_of()
    bare = PositionalCrossEntropy(10.0)(scores).value
    out = CombinedLoss(alpha_focal=0.0, alpha_chain=0.0)(scores, 0.0)
    assert torch.equal(out.total, bare)
    assert torch.equal(twins.gradient(out.total, scores), twins.gradient(bare, scores))
    assert list(out.contributions) == ["cross_entropy"]
    silent = CombinedLoss(alpha_chain=0.0, extra={"more": WeightedTerm(Chain(), weight=0.0)})(
        scores, 0.0
    )
    assert torch.equal(silent.total, CombinedLoss(alpha_chain=0.0)(scores, 0.0).total)


def test_terms_are_reported_unweighted_also_when_off():
    scores = scores_of()
    off = CombinedLoss(gamma=math.inf, alpha_focal=0.0, alpha_chain=0.0)(scores, 0.0)
    on = CombinedLoss()(scores, 0.0)
    assert list(off.terms) == ["cross_entropy", "cross_entropy_uniform", "focal", "chain"]
    for name in ("cross_entropy_uniform", "focal", "chain"):
        assert torch.equal(off.terms[name].numerator, on.terms[name].numerator), name
        assert not off.terms[name].numerator.requires_grad, name
    assert not on.terms["cross_entropy_uniform"].numerator.requires_grad
    assert on.weights == {"cross_entropy": 1.0, "focal": 0.3, "chain": -40.0}
    assert off.weights == {"cross_entropy": 1.0, "focal": 0.0, "chain": 0.0}


def test_contributions_add_up_and_carry_each_terms_gradient():
    scores = scores_of(dtype=torch.float64)
    out = CombinedLoss(gamma=4.0, alpha_focal=0.5, alpha_chain=3.0)(scores, 0.0)
    expected = {
        "cross_entropy": twins.mean(twins.cross_entropy(scores, 4.0)),
        "focal": 0.5 * twins.mean(twins.focal(scores)),
        "chain": -3.0 * twins.mean(twins.chain(scores)),
    }
    assert out.contributions.keys() == expected.keys()
    for name, part in out.contributions.items():
        torch.testing.assert_close(part, expected[name])
        torch.testing.assert_close(
            twins.gradient(part, scores), twins.gradient(expected[name], scores)
        )
    torch.testing.assert_close(sum(out.contributions.values()), out.total)
    torch.testing.assert_close(
        sum(twins.gradient(part, scores) for part in out.contributions.values()),
        twins.gradient(out.total, scores),
    )


def test_the_chain_is_rewarded_not_punished():
    scores = scores_of()
    gradient = twins.gradient(CombinedLoss()(scores, 0.0).contributions["chain"], scores)
    assert (gradient[scores.valid] < 0).all()  # descent raises log q


def test_an_extra_term_is_added_with_its_weight_and_schedule():
    scores = scores_of(dtype=torch.float64)
    extra = WeightedTerm(Chain("valid"), weight=-2.0, schedule=Schedule("linear", end=0.5))
    loss = CombinedLoss(extra={"by_valid": extra})
    out, plain = loss(scores, 0.25), CombinedLoss()(scores, 0.25)
    assert out.weights["by_valid"] == -1.0
    expected = plain.total - twins.mean(twins.chain(scores, "valid"))
    torch.testing.assert_close(out.total, expected)
    assert list(out.terms)[-1] == "by_valid"


def test_a_term_alone_is_the_whole_loss():
    scores = scores_of(dtype=torch.float64)
    loss = CombinedLoss(
        alpha_cross_entropy=0.0,
        alpha_focal=0.0,
        alpha_chain=0.0,
        extra={"streak": WeightedTerm(Chain("none"), weight=-1.0)},
    )
    out = loss(scores, 0.0)
    assert list(out.contributions) == ["streak"]
    torch.testing.assert_close(out.total, -twins.mean(twins.chain(scores, "none")))
    assert "cross_entropy" in out.terms  # it is still reported


def test_a_loss_that_schedules_silence_gives_zero_gradients_and_not_none():
    scores = scores_of(dtype=torch.float64)
    loss = CombinedLoss(
        alpha_cross_entropy=0.0, alpha_focal=0.0, chain_schedule=Schedule("linear", begin=0.5)
    )
    assert loss(scores, 0.1).total == 0
    assert (twins.gradient(loss(scores, 0.1).total, scores) == 0).all()
    assert (twins.gradient(loss(scores, 0.9).total, scores) != 0).any()


def test_focal_options_reach_the_focal_term():
    scores = scores_of(dtype=torch.float64)
    loss = CombinedLoss(gamma=3.0, focal_modulation=2.0, focal_positional=True)
    expected = twins.mean(twins.focal(scores, 2.0, 3.0))
    torch.testing.assert_close(loss(scores, 0.0).terms["focal"].value, expected)


CURVES = [
    (Schedule(), {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    (Schedule("constant", start=0.2, end=0.5), {0.0: 1.0, 1.0: 1.0}),
    (Schedule("linear"), {0.0: 0.0, 0.25: 0.25, 1.0: 1.0}),
    (Schedule("linear", 0.4, 0.2, 0.6), {0.0: 0.4, 0.2: 0.4, 0.4: 0.7, 0.6: 1.0, 0.9: 1.0}),
    (Schedule("linear", 1.0, final=0.0), {0.0: 1.0, 0.75: 0.25, 1.0: 0.0}),
    (Schedule("warmup", end=0.1), {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 1.0: 1.0}),
    (Schedule("warmup", 0.5, 0.2, 0.4), {0.0: 0.0, 0.19: 0.0, 0.2: 0.5, 0.3: 0.75, 0.5: 1.0}),
    (
        Schedule("cosine", 0.2, 0.0, 0.8),
        {0.0: 0.2, 0.2: 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.4: 0.6, 0.8: 1.0, 1.0: 1.0},
    ),
    (Schedule("linear", 0.0, 0.5, 0.5), {0.0: 0.0, 0.49: 0.0, 0.5: 1.0, 1.0: 1.0}),
]


@pytest.mark.parametrize(("schedule", "points"), CURVES)
def test_schedules_pass_through_their_points(schedule, points):
    for progress, factor in points.items():
        assert schedule.multiplier(progress) == pytest.approx(factor), progress


BAD_SCHEDULES = [
    ({"kind": "step"}, "choose constant, linear, warmup or cosine"),
    ({"start": -1.0}, "start is -1.0"),
    ({"final": math.nan}, "final is nan"),
    ({"begin": 0.6, "end": 0.5}, "0 <= begin <= end <= 1"),
    ({"end": 1.5}, "0 <= begin <= end <= 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SCHEDULES)
def test_schedules_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_a_schedule_is_silent_if_it_is_0_throughout():
    for silent in (Schedule("linear", final=0.0), Schedule("warmup", begin=0.5, final=0.0)):
        assert silent.silent
    for heard in (
        Schedule(),
        Schedule("warmup", begin=0.5),
        Schedule("cosine", start=1.0, begin=0.2, final=0.0),
        Schedule("warmup", start=1.0, begin=0.2, end=0.4, final=0.0),
    ):
        assert not heard.silent


def test_a_schedule_moves_its_own_term_only():
    loss = CombinedLoss(
        focal_schedule=Schedule("linear", start=1.0, final=0.0), chain_schedule=Schedule("linear")
    )
    assert loss.weights(0.0) == {"cross_entropy": 1.0, "focal": 0.3, "chain": 0.0}
    assert loss.weights(0.5) == {"cross_entropy": 1.0, "focal": 0.15, "chain": -20.0}
    scores = scores_of()
    begun = loss(scores, 0.0)
    assert "chain" not in begun.contributions
    assert torch.equal(begun.total, CombinedLoss(alpha_chain=0.0)(scores, 0.0).total)
    ended = loss(scores, 1.0)
    assert torch.equal(ended.total, CombinedLoss(alpha_focal=0.0)(scores, 0.0).total)


def test_settings_survive_a_checkpoints_plain_values():
    """Hyper-parameters are saved as plain containers (weights_only), schedules included."""
    loss = CombinedLoss(gamma=math.inf, chain_schedule=Schedule("warmup", end=0.25))
    plain = dataclasses.asdict(loss)
    assert isinstance(plain["chain_schedule"], dict)
    assert CombinedLoss(**plain) == loss
