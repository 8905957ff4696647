"""The loss path must not read a tensor's value on the host: every read would stall the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from losses import BlockScores, CombinedLoss, Schedule
from tests import losses_twins as twins

LOSSES = [
    CombinedLoss(),
    CombinedLoss(gamma=math.inf, alpha_focal=0.0, alpha_chain=0.0),
    CombinedLoss(
        focal_modulation=1.0,
        focal_positional=True,
        chain_normalize="valid",
        chain_schedule=Schedule("cosine", end=0.5),
    ),
]
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES, ids=["paper", "uniform", "options"])


def step(loss, log_prob, correct, valid, counts_N, progress=0.5):
    return loss(BlockScores(log_prob, correct, valid), progress, counts_N, torch.clone)


@ALL_LOSSES
def test_loss_and_gradient_run_on_tensors_without_values(loss):
    """Meta tensors have none: any `.item()`, branch or boolean indexing raises."""
    log_prob = torch.zeros(6, 7, device="meta", requires_grad=True)
    mask = torch.zeros(6, 7, dtype=torch.bool, device="meta")
    out = step(loss, log_prob, mask, mask, torch.zeros(7, dtype=torch.long, device="meta"))
    (gradient,) = torch.autograd.grad(out.total, log_prob)
    assert gradient.shape == (6, 7)
    for ratio in out.terms.values():
        assert ratio.value.shape == ()


def test_meta_tensors_do_catch_a_read():
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()


@ALL_LOSSES
def test_loss_is_one_graph_for_the_compiler(loss):
    scores = twins.random_scores((7, 0, 3), 7, seed=1, dtype=torch.float32)
    arguments = (loss, scores.log_prob, scores.correct, scores.valid, scores.counts_N)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for progress in (0.0, 0.25, 0.5, 1.0):
        out, eager = compiled(*arguments, progress), step(*arguments, progress)
        assert torch.equal(out.total, eager.total)
        assert torch.equal(twins.gradient(out.total, scores), twins.gradient(eager.total, scores))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL_LOSSES
def test_on_cuda_without_a_sync_deterministic_and_equal_to_the_cpu(loss):
    scores = twins.random_scores((15, 0, 3) * 100, 15, seed=2, dtype=torch.float32)
    parts = (scores.log_prob, scores.correct, scores.valid, scores.counts_N)
    on_cpu = step(loss, *parts).total
    log_prob, correct, valid, counts_N = (p.detach().cuda() for p in parts)
    log_prob.requires_grad_()
    step(loss, log_prob, correct, valid, counts_N).total.backward()  # warm up
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            total = step(loss, log_prob, correct, valid, counts_N).total
        (gradient,) = torch.autograd.grad(total, log_prob)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.cpu(), on_cpu.detach())
    torch.testing.assert_close(gradient.cpu(), twins.gradient(on_cpu, scores))
