"""Invalid slots, whole blocks without a valid one, and probabilities at either end."""

from __future__ import annotations

import math

import pytest
import torch

from losses import (
    BlockScores,
    Chain,
    CombinedLoss,
    DPace,
    FirstErrorFocal,
    PositionalCrossEntropy,
)
from losses.ratio import Ratio
from tests import losses_twins as twins

LOSSES = [
    CombinedLoss(gamma=4.0),
    CombinedLoss(gamma=4.0, focal_modulation=0.5, focal_positional=True, chain_normalize="valid"),
]
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES, ids=["paper", "options"])


def block_scores(log_prob, correct, valid):
    return BlockScores(
        torch.tensor(log_prob, dtype=torch.float32, requires_grad=True),
        torch.tensor(correct, dtype=torch.bool),
        torch.tensor(valid, dtype=torch.bool),
    )


def test_a_gap_in_validity_is_refused():
    with pytest.raises(ValueError, match="valid slot after an invalid one"):
        block_scores([[0.0] * 3] * 2, [[0] * 3] * 2, [[1, 1, 0], [1, 0, 1]])
    with pytest.raises(ValueError, match="valid slot after an invalid one"):
        block_scores([[0.0] * 3], [[0] * 3], [[0, 1, 1]])


@ALL_LOSSES
@pytest.mark.parametrize("garbage", [0.0, -7.0, 3.0, -math.inf, math.inf, math.nan])
def test_invalid_slots_get_exactly_no_gradient_and_cannot_change_the_loss(loss, garbage):
    clean = twins.random_scores((4, 0, 2, 1), 4, seed=1)
    with torch.no_grad():
        log_prob = torch.where(clean.valid, clean.log_prob, garbage)
    dirty = BlockScores(log_prob.requires_grad_(), ~clean.valid ^ clean.correct, clean.valid)
    out = loss(dirty, 0.0)
    assert torch.equal(out.total, loss(clean, 0.0).total)
    gradient = twins.gradient(out.total, dirty)
    assert (gradient[~clean.valid] == 0).all()
    assert (gradient[clean.valid] != 0).all()  # cross-entropy reaches every valid slot


@ALL_LOSSES
def test_no_valid_slot_at_all_is_zero_and_connected(loss):
    scores = block_scores([[0.0] * 3] * 2, [[0] * 3] * 2, [[0] * 3] * 2)
    out = loss(scores, 0.0)
    assert out.total.item() == 0
    assert torch.equal(twins.gradient(out.total, scores), torch.zeros(2, 3))
    for ratio in out.terms.values():
        assert ratio.value.item() == ratio.denominator.item() == 0


@ALL_LOSSES
def test_no_block_at_all_is_zero_and_connected(loss):
    mask = torch.zeros(0, 3, dtype=torch.bool)
    scores = BlockScores(torch.zeros(0, 3, requires_grad=True), mask, mask)
    out = loss(scores, 0.0)
    assert out.total.item() == 0
    assert out.total.requires_grad


def test_all_correct_blocks_have_no_first_error():
    scores = block_scores([[-0.1, -0.2], [-0.3, 0.0]], [[1, 1], [1, 0]], [[1, 1], [1, 0]])
    ratio = FirstErrorFocal()(scores)
    assert ratio.value.item() == ratio.denominator.item() == 0
    assert torch.equal(twins.gradient(ratio.value, scores), torch.zeros(2, 2))


def test_blocks_without_a_valid_slot_count_nowhere():
    some = twins.random_scores((3, 1), 3, seed=2)
    empty = twins.random_scores((0, 0, 0), 3, seed=3)
    both = twins.joined([some, empty])
    out, alone = CombinedLoss()(both, 0.0), CombinedLoss()(some, 0.0)
    for name, ratio in out.terms.items():
        assert torch.equal(ratio.denominator, alone.terms[name].denominator), name
        torch.testing.assert_close(ratio.numerator, alone.terms[name].numerator)
    torch.testing.assert_close(out.total, alone.total)


def test_a_partial_block_is_still_divided_by_all_drafted_slots():
    """Else the end of a response, where blocks are short, would weigh more than the paper's."""
    scores = block_scores([[math.log(0.5), 0.0, 0.0, 0.0]], [[1] * 4], [[1, 0, 0, 0]])
    assert Chain()(scores).value.item() == pytest.approx(0.5 / 4)
    assert Chain("valid")(scores).value.item() == pytest.approx(0.5)


def test_a_perfect_drafter_reaches_the_bound_of_the_chain():
    scores = block_scores([[0.0] * 7] * 3, [[1] * 7] * 3, [[1] * 7] * 3)
    out = CombinedLoss()(scores, 0.0)
    assert out.terms["chain"].value.item() == 1.0
    assert out.terms["cross_entropy"].value.item() == 0.0
    assert out.total.item() == -40.0


def test_a_chain_of_many_small_factors_keeps_its_head():
    """A product of 63 factors in fp32 must not take the first ones with it."""
    log_prob = torch.full((1, 63), -1e4)
    log_prob[0, :2] = math.log(0.5)
    log_prob.requires_grad_()
    mask = torch.ones(1, 63, dtype=torch.bool)
    value = Chain()(BlockScores(log_prob, mask, mask)).value
    (gradient,) = torch.autograd.grad(value, log_prob)
    assert value.item() == pytest.approx(0.75 / 63)
    torch.testing.assert_close(gradient[0, :2] * 63, torch.tensor([0.75, 0.25]))
    assert (gradient[0, 2:] == 0).all()


@ALL_LOSSES
@pytest.mark.parametrize("low", [-1e4, -104.0, -1e-30, 0.0])
def test_extreme_probabilities_give_finite_losses_and_gradients(loss, low):
    log_prob = torch.full((3, 15), low)
    log_prob[1] = -0.7
    log_prob.requires_grad_()
    valid = torch.ones(3, 15, dtype=torch.bool)
    # an error cannot have q = 1: where q is, all slots are correct
    correct = torch.full_like(valid, low > -0.5)
    out = loss(BlockScores(log_prob, correct, valid), 0.0)
    (gradient,) = torch.autograd.grad(out.total, log_prob)
    assert out.total.isfinite()
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


@ALL_LOSSES
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_no_nan_arises_inside_the_backward_pass_either(loss):
    """Else Lightning's `detect_anomaly: true` would stop a sound run."""
    scores = twins.random_scores((4, 0, 2, 1), 4, seed=1, dtype=torch.float32)
    scores.correct[0] = True  # a block without an error
    with torch.autograd.detect_anomaly():
        loss(scores, 0.0).total.backward()


def test_a_ratio_over_nothing_is_zero_with_a_finite_gradient():
    numerator = torch.zeros((), requires_grad=True)
    value = Ratio(numerator * 2, torch.zeros(())).value
    (gradient,) = torch.autograd.grad(value, numerator)
    assert value.item() == gradient.item() == 0


BAD_SCORES = [
    ({"log_prob": torch.zeros(6)}, "must be .blocks, drafted slots"),
    ({"log_prob": torch.zeros(2, 0)}, "at least one slot"),
    ({"log_prob": torch.zeros(2, 3, dtype=torch.bfloat16)}, "computed in fp32"),
    ({"correct": torch.zeros(2, 3)}, "BlockScores.correct is torch.float32"),
    ({"valid": torch.zeros(3, 2, dtype=torch.bool)}, r"BlockScores.valid .*\(3, 2\)"),
    ({"kl": torch.zeros(2, 3, dtype=torch.float64)}, "BlockScores.kl is torch.float64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SCORES)
def test_scores_of_another_shape_or_dtype_are_refused(change, message):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        BlockScores(**{"log_prob": torch.zeros(2, 3), "correct": mask, "valid": mask} | change)


BAD_SETTINGS = [
    ({"gamma": 0.0}, "gamma is 0.0"),
    ({"gamma": math.nan}, "gamma is nan"),
    ({"alpha_focal": -0.1}, "alpha_focal is -0.1"),
    ({"alpha_cross_entropy": -1.0}, "alpha_cross_entropy is -1.0"),
    (dict.fromkeys(("alpha_cross_entropy", "alpha_focal", "alpha_chain"), 0.0), "is 0; give at"),
    ({"alpha_chain": math.inf}, "alpha_chain is inf"),
    ({"focal_modulation": -1.0}, "modulation is -1.0"),
    ({"chain_normalize": "slots"}, "normalised by 'slots'"),
    ({"extra": {"chain": Chain()}}, "called 'chain'"),
    ({"extra": {"more": Chain()}}, "give a WeightedTerm"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CombinedLoss(**settings)


def test_a_negative_gamma_is_refused_by_the_term_itself():
    with pytest.raises(ValueError, match="gamma is -4"):
        PositionalCrossEntropy(-4.0)
    with pytest.raises(ValueError, match="gamma is -4"):
        FirstErrorFocal(positional_gamma=-4.0)


def test_what_dpace_can_not_be_is_refused():
    with pytest.raises(ValueError, match=r"smoothing is 1\.5; give a number from 0 to 1"):
        DPace(1.5)
    with pytest.raises(ValueError, match="part is 'suffix'"):
        DPace(part="suffix")
