"""Each term's value and gradient against float64 loops and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from losses import (
    AcceptUntilFail,
    BlockScores,
    Chain,
    CombinedLoss,
    DPace,
    FirstErrorFocal,
    PositionalCrossEntropy,
    Schedule,
)
from losses.positional import positional_weights
from tests import losses_twins as twins

NUM_SLOTS = 5
LENGTHS = (5, 0, 1, 3, 5, 2, 0, 4)
TERMS = {
    "cross_entropy": (PositionalCrossEntropy(4.0), lambda s: twins.cross_entropy(s, 4.0)),
    "uniform": (PositionalCrossEntropy(math.inf), lambda s: twins.cross_entropy(s, math.inf)),
    "focal": (FirstErrorFocal(), twins.focal),
    "focal_modulated": (FirstErrorFocal(2.0), lambda s: twins.focal(s, 2.0)),
    "focal_half_modulated": (FirstErrorFocal(0.5), lambda s: twins.focal(s, 0.5)),
    "focal_positional": (
        FirstErrorFocal(1.0, positional_gamma=3.0),
        lambda s: twins.focal(s, 1.0, 3.0),
    ),
    "chain": (Chain(), twins.chain),
    "chain_by_valid": (Chain("valid"), lambda s: twins.chain(s, "valid")),
    "streak": (Chain("none"), lambda s: twins.chain(s, "none")),
    "accept_until_fail": (AcceptUntilFail(), twins.accept_until_fail),
    "dpace": (DPace(), twins.dpace),
    "dpace_unsmoothed": (DPace(0.0), lambda s: twins.dpace(s, 0.0)),
    "dpace_prefix": (DPace(part="prefix"), lambda s: twins.dpace(s, part="prefix")),
    "dpace_continuation": (
        DPace(0.2, "continuation"),
        lambda s: twins.dpace(s, 0.2, "continuation"),
    ),
    "dpace_continuation_unsmoothed": (
        DPace(0.0, "continuation"),
        lambda s: twins.dpace(s, 0.0, "continuation"),
    ),
}
ALL_TERMS = pytest.mark.parametrize("name", TERMS)


@ALL_TERMS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_those_of_the_loop(name, seed, dtype):
    term, twin = TERMS[name]
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed, dtype)
    ratio, (numerator, denominator) = term(scores), twin(scores)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    assert ratio.numerator.dtype == ratio.denominator.dtype == dtype
    assert ratio.numerator.shape == ratio.denominator.shape == ()
    torch.testing.assert_close(ratio.numerator, numerator.to(dtype), **tolerance)
    torch.testing.assert_close(ratio.denominator, torch.tensor(denominator, dtype=dtype))
    torch.testing.assert_close(
        twins.gradient(ratio.value, scores),
        twins.gradient(twins.mean((numerator, denominator)), scores),
        **tolerance,
    )


@ALL_TERMS
@pytest.mark.parametrize("seed", range(3))
def test_a_label_outside_a_reduced_vocabulary_is_wrong_and_never_skipped(name, seed):
    """A20: it counts in every denominator, breaks every chain, and nothing is infinite."""
    term, twin = TERMS[name]
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed, outside=0.4)
    assert scores.outside.any()
    ratio, (numerator, denominator) = term(scores), twin(scores)
    exactly = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ratio.numerator, numerator, **exactly)
    assert float(ratio.denominator) == pytest.approx(denominator, rel=1e-12)
    grad = twins.gradient(ratio.value, scores)
    expected = twins.gradient(twins.mean((numerator, denominator)), scores)
    torch.testing.assert_close(grad, expected, **exactly)
    assert not grad[scores.outside].any()
    # as many slots and blocks as without: nothing is left out but infinite surprise
    all_inside = BlockScores(scores.log_prob, scores.correct, scores.valid)
    assert term(all_inside).denominator == ratio.denominator


def test_labels_outside_leave_the_total_finite_and_window_counts_as_they_are():
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=9, outside=0.4)
    for settings in ({}, {"focal_modulation": 0.5}, {"alpha_cross_entropy": 0.0}):
        out = CombinedLoss(**settings)(scores, 0.0)
        grad = twins.gradient(out.total, scores)
        assert torch.isfinite(out.total)
        assert torch.isfinite(grad).all()
    torch.testing.assert_close(CombinedLoss()(scores, 0.0).total, twins.total(scores))
    off = Schedule("warmup", begin=0.5)  # every term is off at first
    silent = CombinedLoss(
        alpha_cross_entropy=0.0, alpha_focal=1.0, alpha_chain=0.0, focal_schedule=off
    )(scores, 0.0)
    assert silent.total == 0


# D-PACE's weights move with the probabilities, but are not differentiated
@pytest.mark.parametrize("name", [name for name in TERMS if not name.startswith("dpace")])
def test_gradient_is_that_of_finite_differences(name):
    term, _ = TERMS[name]
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=3)

    def value(log_prob):
        return term(BlockScores(log_prob, scores.correct, scores.valid)).value

    assert torch.autograd.gradcheck(value, (scores.log_prob,))


@pytest.mark.parametrize("settings", [{}, {"focal_modulation": 1.5, "focal_positional": True}])
def test_gradient_of_the_total_is_that_of_finite_differences(settings):
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=4)
    loss = CombinedLoss(gamma=4.0, **settings)

    def value(log_prob):
        return loss(BlockScores(log_prob, scores.correct, scores.valid), 0.0).total

    assert torch.autograd.gradcheck(value, (scores.log_prob,))


def test_total_is_that_of_the_loop():
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=5)
    out, expected = CombinedLoss()(scores, 0.0), twins.total(scores)
    torch.testing.assert_close(out.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        twins.gradient(out.total, scores), twins.gradient(expected, scores), rtol=1e-12, atol=1e-12
    )


def test_focal_selection_is_not_differentiated_and_touches_one_slot_of_a_block():
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=6)
    touched = twins.gradient(FirstErrorFocal()(scores).value, scores) != 0
    assert touched.any()
    assert (touched.sum(1) <= 1).all()
    before = touched.long().cumsum(1) == 0  # slots before j*: all correct
    assert scores.correct[before & scores.valid].all()
    assert not scores.correct[touched].any()


def test_chain_gradient_is_that_of_unsmoothed_dpace_over_n():
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=7)
    expected = -twins.gradient(DPace(smoothing=0.0)(scores).value, scores) / NUM_SLOTS
    torch.testing.assert_close(
        twins.gradient(Chain()(scores).value, scores), expected, rtol=1e-12, atol=1e-15
    )


def test_dpace_smoothed_to_one_counts_the_slots_that_follow():
    scores = twins.random_scores((3, 0), 4, seed=7)
    weights = DPace(smoothing=1.0).weights(scores)
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2, 1, 0], [0, 0, 0, 0]]).double())
    prefix = DPace(1.0, "prefix").weights(scores)  # plain cross-entropy, by the block
    torch.testing.assert_close(prefix, scores.valid.double())


@pytest.mark.parametrize("part", ["both", "prefix", "continuation"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_dpace_stays_finite_where_probabilities_underflow(smoothing, part):
    valid = torch.ones(1, 3, dtype=torch.bool)
    log_prob = torch.tensor([[-200.0, -1.0, -300.0]], requires_grad=True)
    value = DPace(smoothing, part)(BlockScores(log_prob, ~valid, valid)).value
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(log_prob.grad).all()


def test_positional_weights_for_block_size_8_and_gamma_4():
    """A18: the first port of DFlash had other weights than the paper."""
    weights_N = positional_weights(4.0, torch.zeros(7, dtype=torch.float64))
    expected = torch.tensor([math.exp(-(k - 1) / 4) for k in range(1, 8)], dtype=torch.float64)
    torch.testing.assert_close(weights_N, expected, rtol=1e-15, atol=0)
    assert [round(w, 4) for w in weights_N[:3].tolist()] == [1.0, 0.7788, 0.6065]


def test_infinite_gamma_is_exactly_uniform():
    assert torch.equal(positional_weights(math.inf, torch.zeros(63)), torch.ones(63))
    scores = twins.random_scores(LENGTHS, NUM_SLOTS, seed=8, dtype=torch.float32)
    terms = CombinedLoss(gamma=math.inf)(scores, 0.0).terms
    for part in ("numerator", "denominator"):
        uniform = getattr(terms["cross_entropy_uniform"], part)
        assert torch.equal(getattr(terms["cross_entropy"], part).detach(), uniform)
    mean_nll = -scores.log_prob[scores.valid].double().mean()
    torch.testing.assert_close(terms["cross_entropy_uniform"].value.double(), mean_nll.detach())
