"""Guards overlap and reverse KL: scores in chunks are those of two dense distributions."""

from __future__ import annotations

import math

import pytest
import torch

import drafter.head as head_module
from drafter.blocks import build_blocks
from drafter.head import FrozenHead, score_blocks, score_slots
from drafter.soft_labels import soft_labels
from drafter.whole_scores import TargetStates
from losses import BlockScores, CombinedLoss, ForwardKL, Overlap, ReverseKL, WeightedTerm
from losses.scores import WHOLE_SCORES
from tests.losses_twins import valid_positions, weight
from tests.test_soft_labels import make_batch, make_head

VARIANTS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "bias": {"bias": True, "scale": 1.7},
    "capped": {"bias": True, "softcap": 2.0},
}


def dense(head, target_hidden, hidden, temperature):
    """Both scores token by token, by the book."""
    log_p = (head.logits(target_hidden) / temperature).log_softmax(-1)
    log_q = (head.logits(hidden) / temperature).log_softmax(-1)
    return {
        "overlap": torch.minimum(log_p.exp(), log_q.exp()).sum(-1),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
    }


def states(hidden, temperature=1.0, names=WHOLE_SCORES):
    return TargetStates(hidden, temperature, names)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_chunks_give_the_dense_scores_and_their_gradients(variant, temperature, chunk_rows):
    head = make_head(**VARIANTS[variant])
    target_hidden = torch.randn(20, 7, dtype=torch.float64)
    hidden = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 23, (20,))
    upstream = torch.randn(3, 20, dtype=torch.float64)
    alone = score_slots(head, hidden, labels, chunk_rows)
    expected = dense(head, target_hidden, hidden, temperature)
    parts = (alone.log_prob, *expected.values())
    loss = sum((own * up).sum() for own, up in zip(parts, upstream, strict=True))
    (expected_grad,) = torch.autograd.grad(loss, hidden)

    given = states(target_hidden, temperature)
    scores = score_slots(head, hidden, labels, chunk_rows, target=given)
    assert scores.further.keys() == expected.keys()
    parts = (scores.log_prob, *scores.further.values())
    loss = sum((own * up).sum() for own, up in zip(parts, upstream, strict=True))
    (grad,) = torch.autograd.grad(loss, hidden)
    for name, score in expected.items():
        torch.testing.assert_close(scores.further[name], score)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(scores.log_prob, alone.log_prob)
    assert torch.equal(scores.correct, alone.correct)
    with torch.no_grad():
        again = score_slots(head, hidden, labels, chunk_rows, target=given)
    assert all(torch.equal(again.further[name], scores.further[name]) for name in WHOLE_SCORES)


def test_one_score_alone_and_beside_kl_is_the_same():
    head = make_head(bias=True)
    target_hidden, hidden = torch.randn(2, 20, 7, dtype=torch.float64)
    labels = torch.zeros(20).long()
    both = score_slots(head, hidden, labels, target=states(target_hidden)).further
    soft = soft_labels(head, target_hidden)
    for name in WHOLE_SCORES:
        given = states(target_hidden, names=(name,))
        one = score_slots(head, hidden.requires_grad_(), labels, soft=soft, target=given).further
        assert list(one) == ["kl", name]
        torch.testing.assert_close(one[name], both[name])


def test_where_the_drafter_agrees_nothing_is_left_to_gain():
    head = make_head(bias=True)
    hidden = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    found = score_slots(
        head, hidden, torch.zeros(20).long(), target=states(hidden.detach().clone())
    ).further
    torch.testing.assert_close(found["overlap"], torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(found["reverse_kl"], torch.zeros(20, dtype=torch.float64))
    (grad,) = torch.autograd.grad(found["overlap"].sum() + found["reverse_kl"].sum(), hidden)
    torch.testing.assert_close(grad, torch.zeros_like(grad))


def point_mass():
    """Scores of a target that is sure of its labels, by block."""
    head, batch = make_head(), make_batch()
    blocks = build_blocks(batch, 5, 0)
    sure = torch.zeros(2, 12, 7, dtype=torch.float64)
    for row in range(2):
        for place in range(11):
            # any state whose head is sure of the next token
            label = batch.input_ids[row, place + 1]
            others = head.weight - head.weight[label]
            direction = torch.randn(4096, 7, dtype=torch.float64)
            gaps = (direction @ others.T).masked_fill(torch.arange(23) == label, -math.inf)
            best = gaps.amax(-1).argmin()
            assert gaps[best].amax() < 0
            sure[row, place] = direction[best] * (50 / -gaps[best].amax())
    hidden = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    return score_blocks(head, hidden, blocks, target=states(sure.flatten(0, 1))), hidden


def test_at_a_point_mass_overlap_is_the_labels_probability_and_its_log_is_cross_entropy():
    torch.manual_seed(0)
    scores, hidden = point_mass()
    valid = scores.valid
    torch.testing.assert_close(scores.overlap[valid], scores.log_prob[valid].exp())
    log, cross_entropy = Overlap(4.0, "log")(scores), CombinedLoss(4.0, 0.0, 0.0)(scores, 0.0)
    torch.testing.assert_close(log.value, cross_entropy.total)
    grads = [
        torch.autograd.grad(loss, hidden, retain_graph=True)[0]
        for loss in (log.value, cross_entropy.total)
    ]
    torch.testing.assert_close(*grads)


def a_batch_of_scores(**changes):
    torch.manual_seed(3)
    valid = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    scores = torch.rand(4, 3, 3, dtype=torch.float64) * 0.8 + 0.1
    given = {
        "log_prob": scores[0].log(),
        "correct": scores[1] > 0.5,
        "valid": valid,
        "overlap": scores[2].requires_grad_(),
        "kl": scores[3],
        "reverse_kl": scores[3] * 2,
    }
    return BlockScores(**{**given, **changes})


@pytest.mark.parametrize("gamma", [2.0, math.inf])
def test_each_loss_on_its_twin(gamma):
    scores = a_batch_of_scores()
    share = [[math.exp(-3 * a) for a in row] for row in scores.overlap.tolist()]
    a, kl, reverse = (s.tolist() for s in (scores.overlap, scores.kl, scores.reverse_kl))
    twins = {
        Overlap(gamma): lambda m, k: 1 - a[m][k],
        Overlap(gamma, "log"): lambda m, k: -math.log(a[m][k]),
        Overlap(gamma, "blend"): lambda m, k: (
            share[m][k] * kl[m][k] + (1 - share[m][k]) * (1 - a[m][k])
        ),
        ReverseKL(gamma): lambda m, k: reverse[m][k],
    }
    for loss, cost in twins.items():
        numerator = denominator = 0.0
        for m in range(3):
            for k in valid_positions(scores, m):
                numerator += weight(k, gamma) * cost(m, k - 1)
                denominator += weight(k, gamma)
        assert loss(scores).value.item() == pytest.approx(numerator / denominator)


def test_the_blend_holds_its_share_fixed_and_invalid_slots_get_no_gradient():
    scores = a_batch_of_scores()
    loss = Overlap(math.inf, "blend")(scores).value
    (grad,) = torch.autograd.grad(loss, scores.overlap)
    expected = -(1 - torch.exp(-3 * scores.overlap)) * scores.valid / scores.valid.sum()
    torch.testing.assert_close(grad, expected.detach())


def test_no_token_in_common_is_a_large_finite_cost():
    scores = a_batch_of_scores(overlap=torch.zeros(3, 3, dtype=torch.float64))
    assert 100 < Overlap(form="log")(scores).value < math.inf


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Overlap(form="square"), "form is 'square'"),
        (lambda: Overlap(temperature=0.0), "temperature of a loss is 0.0"),
        (lambda: ReverseKL(temperature=math.inf), "temperature of a loss is inf"),
        (lambda: Overlap(form="blend", temperature=0.5), "blend's KL is at 1"),
        (lambda: Overlap(decay=-1.0), "decay is -1.0"),
        (
            lambda: CombinedLoss(
                extra={
                    "a": WeightedTerm(Overlap(temperature=0.5)),
                    "b": WeightedTerm(ForwardKL()),
                }
            ),
            "different temperatures",
        ),
        (lambda: Overlap()(a_batch_of_scores(overlap=None)), "BlockScores.overlap is missing"),
    ],
)
def test_what_does_not_go_is_one_clear_error(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_a_loss_reads():
    assert CombinedLoss().reads == ()
    blend = CombinedLoss(extra={"blend": WeightedTerm(Overlap(form="blend"))})
    assert (blend.reads, blend.reads_whole) == (("kl", "overlap"), ("overlap",))
    cold = CombinedLoss(extra={"cold": WeightedTerm(ReverseKL(temperature=0.3))})
    assert (cold.reads, cold.temperature) == (("reverse_kl",), 0.3)


def test_low_precision_stays_near():
    exact = make_head(dtype=torch.float32)
    low = FrozenHead(exact.weight.bfloat16())
    target_hidden, hidden = torch.randn(2, 20, 7)
    found = score_slots(low, hidden, torch.zeros(20).long(), target=states(target_hidden)).further
    expected = dense(exact, target_hidden, hidden, 1.0)
    assert all(score.dtype == torch.float32 for score in found.values())
    torch.testing.assert_close(found["overlap"], expected["overlap"], atol=0.02, rtol=0.02)
    torch.testing.assert_close(found["reverse_kl"], expected["reverse_kl"], atol=0.1, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_slopes_stay_near(monkeypatch, dtype):
    """A drafter that knows nothing yet, of many tokens: its weights are below fp16's range."""

    def exact(left, right):  # as on a GPU: sums and results are fp32, whatever goes in
        return left.float() @ right.float()

    monkeypatch.setattr(head_module, "matmul_fp32", exact)
    torch.manual_seed(0)
    rows = torch.randn(30_000, 16).to(dtype)
    hidden = (0.01 * torch.randn(6, 16)).to(dtype).float().requires_grad_()
    sure = (4 * torch.randn(6, 16)).to(dtype).float()
    given = states(sure), torch.zeros(6).long()
    found = score_slots(FrozenHead(rows), hidden, given[1], target=given[0]).further
    expected = dense(FrozenHead(rows.double()), sure.double(), hidden.double(), 1.0)
    for name in WHOLE_SCORES:
        (grad,) = torch.autograd.grad(found[name].sum(), hidden, retain_graph=True)
        (same,) = torch.autograd.grad(expected[name].sum(), hidden, retain_graph=True)
        off = (grad - same).norm(dim=-1) / same.norm(dim=-1)
        assert off.max() < (0.02 if dtype == torch.bfloat16 else 0.002), name
