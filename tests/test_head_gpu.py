"""Guards the compiled scoring on a GPU: the eager scores, in no more memory."""

from __future__ import annotations

import pytest
import torch

from drafter.head import FrozenHead, score_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_compiled_scores_are_the_eager_ones(softcap):
    torch.manual_seed(0)
    vocab, width, slots = 49_152, 576, 3_000  # two whole chunks and a rest
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) * 0.05
    weight[vocab // 2 :] = weight[: vocab // 2]  # every maximum is a tie
    head = FrozenHead(weight, softcap=softcap)
    hidden = torch.randn(slots, width, device="cuda", requires_grad=True)
    labels = torch.randint(0, vocab, (slots,), device="cuda")
    # in the chunks of the scoring: products of another shape rank near-ties otherwise
    chunks = hidden.detach().split(head.chunk_rows())
    top = torch.cat([head.logits(chunk)[:, : vocab // 2].argmax(-1) for chunk in chunks])
    labels[:1000] = top[:1000]
    labels[1000:2000] = top[1000:2000] + vocab // 2
    found, peaks = {}, {}
    for compiled in (False, True):
        for _ in range(2):  # the compiler's own buffers go
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            scores = score_slots(head, hidden, labels, compiled=compiled)
            (grad,) = torch.autograd.grad(scores.log_prob.sum(), hidden)
            peaks[compiled] = torch.cuda.max_memory_allocated() - before
        found[compiled] = (scores.log_prob, scores.correct, grad)
    log_prob, correct, grad = found[True]
    torch.testing.assert_close(log_prob, found[False][0], rtol=1e-5, atol=1e-4)
    assert torch.equal(correct, found[False][1])
    assert correct[:1000].all()
    assert not correct[1000:2000].any()
    torch.testing.assert_close(grad, found[False][2], rtol=2e-2, atol=2e-3)
    assert peaks[True] <= 1.05 * peaks[False]
