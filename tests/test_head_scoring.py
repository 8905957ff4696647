"""Guards D1 (a dense (tokens, V) copy) and the frozen head's analytic gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from drafter import head as head_module
from drafter.blocks import Blocks
from drafter.head import FrozenHead, score_blocks, score_slots

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def make_head(vocab=23, width=7, bias=False, dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    weight = torch.randn(vocab, width, dtype=dtype)
    return FrozenHead(weight, torch.randn(vocab, dtype=dtype) if bias else None, **kwargs)


def dense_log_prob(head, hidden, labels):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1), logits.argmax(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_chunks_equal_the_dense_twin_forward_and_backward(variant, chunk_rows):
    head = make_head(**VARIANTS[variant])
    hidden = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 23, (20,))
    expected, top = dense_log_prob(head, hidden, labels)
    upstream = torch.randn(20, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    scores = score_slots(head, hidden, labels, chunk_rows)
    (grad,) = torch.autograd.grad((scores.log_prob * upstream).sum(), hidden)
    torch.testing.assert_close(scores.log_prob, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(scores.correct, top == labels)
    with torch.no_grad():
        without_graph = score_slots(head, hidden, labels, chunk_rows)
    assert torch.equal(without_graph.log_prob, scores.log_prob)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_compiler_is_given_scores_alike(monkeypatch, variant, dtype):
    fold = torch.compile(partial(head_module._fold, in_place=False), backend="aot_eager")
    monkeypatch.setattr(head_module, "_compiled_fold", lambda: fold)
    head = make_head(**VARIANTS[variant], dtype=dtype)
    hidden = torch.randn(20, 7, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 23, (20,))
    upstream = torch.randn(20, dtype=torch.float64)
    found = {}
    for compiled in (False, True):
        scores = score_slots(head, hidden, labels, 6, compiled=compiled)
        (grad,) = torch.autograd.grad((scores.log_prob * upstream).sum(), hidden)
        found[compiled] = (scores.log_prob, scores.correct, grad)
        assert torch.equal(
            score_slots(head, hidden.detach(), labels, 6, compiled=compiled).log_prob,
            scores.log_prob,
        )
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_gradient_passes_gradcheck(variant):
    head = make_head(**VARIANTS[variant])
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 22, 5, 5])
    assert torch.autograd.gradcheck(lambda h: score_slots(head, h, labels, 2).log_prob, hidden)


def test_ties_go_to_the_lowest_id():
    head = FrozenHead(torch.tensor([[0.0], [1.0], [1.0]]))
    scores = score_slots(head, torch.ones(2, 1), torch.tensor([1, 2]))
    assert scores.correct.tolist() == [True, False]


def test_bf16_scores_stay_near_fp32():
    torch.manual_seed(0)
    weight, hidden = torch.randn(500, 64) * 0.1, torch.randn(40, 64)
    labels = torch.randint(0, 500, (40,))
    exact = score_slots(FrozenHead(weight), hidden, labels).log_prob
    low = score_slots(FrozenHead(weight.bfloat16()), hidden, labels).log_prob
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.01)


def make_blocks(valid):
    rows, anchors, drafted = valid.shape
    zeros = torch.zeros(rows, anchors, drafted + 1).long()
    labels = torch.randint(0, 23, valid.shape) * valid
    return Blocks(torch.zeros(rows, anchors).long(), zeros, labels, valid, zeros)


def test_slot_0_and_invalid_slots_never_reach_the_head_and_get_zero_gradient():
    head = make_head()
    valid = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [1, 1, 1]]]).bool()
    hidden = torch.randn(2, 2, 4, 7, dtype=torch.float64)
    hidden[:, :, 0] = torch.nan  # would spread to every score it touched
    hidden[:, :, 1:][~valid] = torch.nan
    hidden.requires_grad_(True)
    for num_slots in (None, int(valid.sum())):
        scores = score_blocks(head, hidden, make_blocks(valid), num_slots)
        (grad,) = torch.autograd.grad(scores.log_prob.sum(), hidden)
        assert torch.isfinite(scores.log_prob).all()
        assert (scores.log_prob[~valid.flatten(0, 1)] == 0).all()
        assert (grad[:, :, 0] == 0).all()
        assert (grad[:, :, 1:][~valid] == 0).all()
        assert (grad[:, :, 1:][valid] != 0).all()


def test_no_valid_slot_still_gives_a_connected_graph():
    hidden = torch.randn(1, 2, 4, 7, dtype=torch.float64, requires_grad=True)
    scores = score_blocks(make_head(), hidden, make_blocks(torch.zeros(1, 2, 3).bool()))
    scores.log_prob.sum().backward()
    assert (hidden.grad == 0).all()


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    seen = []
    real = FrozenHead.logits

    def spy(self, hidden):
        seen.append(len(hidden))
        return real(self, hidden)

    monkeypatch.setattr(FrozenHead, "logits", spy)
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 23 * 4)
    hidden = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    score_slots(make_head(), hidden, torch.zeros(10).long()).log_prob.sum().backward()
    assert seen == [4, 4, 2]  # and the backward pass asked for no logits again
