"""Guards compiled steps on a GPU: gradients of weights are not rounded, attention runs once."""

from __future__ import annotations

import pytest
import torch

from drafter.model import Projection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_weight_s_gradient_is_the_product_in_fp32():
    torch.manual_seed(0)
    layer = Projection(256, 128, bias=False).cuda()
    x = torch.randn(512, 256, device="cuda").bfloat16()
    upstream = torch.randn(512, 128, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        out = torch.compile(layer)(x)
    out.backward(upstream)
    expected = upstream.float().t() @ x.float()
    error = (layer.weight.grad - expected).norm() / expected.norm()
    rounded = (expected.bfloat16().float() - expected).norm() / expected.norm()
    assert error < rounded / 10
