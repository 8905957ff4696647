"""Guards the clip that fused AdamW does by itself: the same step as clipped gradients give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drafter.optimisation import OptimiserSettings, clip, make_optimizer

SETTINGS = OptimiserSettings(1e-2, 0.1, (0.9, 0.95), 0.0, 1.0)


def steps(fused, limit, scale):
    """Returns weights, norms and gradients' norms after some steps."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))]
    left_out = nn.Parameter(torch.randn(3))  # has no gradient
    optimizer, _ = make_optimizer([*weights, left_out], SETTINGS, 10, fused=fused)
    norms = []
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight) * scale
        norms.append(clip(optimizer, [*weights, left_out], limit))
        optimizer.step()
    return weights, torch.stack(norms)


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 1.0), (1.0, 0.01), (0.0, 3.0), (0.2, 3.0)])
def test_a_fused_step_clips_as_torch_does(limit, scale):
    expected, norms = steps(False, limit, scale)
    found, same_norms = steps(True, limit, scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norms, same_norms)


def test_the_norm_is_that_before_clipping_and_gradients_end_at_the_limit():
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    optimizer, _ = make_optimizer([weight], SETTINGS, 10, fused=False)
    assert clip(optimizer, [weight], 1.5) == 6.0
    assert torch.linalg.vector_norm(weight.grad) == pytest.approx(1.5)


def test_without_a_limit_the_last_one_is_forgotten():
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    optimizer, _ = make_optimizer([weight], SETTINGS, 10, fused=True)
    clip(optimizer, [weight], 1.0)
    clip(optimizer, [weight], 0.0)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"][0] == pytest.approx(0.3)


def test_a_clipped_step_differs_from_one_that_is_not():
    """AdamW hardly feels one factor for all steps; the second step's moments do."""
    clipped, _ = steps(True, 0.2, 3.0)
    free, _ = steps(True, 0.0, 3.0)
    assert not torch.allclose(clipped[0], free[0], rtol=1e-4)
