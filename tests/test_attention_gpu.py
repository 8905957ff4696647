"""Guards D4 on a GPU: flex and SDPA agree forward and backward, and new lengths don't recompile."""

from __future__ import annotations

import pytest
import torch

from drafter.attention import FULL, LayerAttention, attend, build_visibility, choose_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(kind, context, anchors, dtype, layer=FULL, head_dim=64, rows=2):
    torch.manual_seed(0)
    block_size = 16
    draw = torch.stack([torch.randperm(context - 1)[:anchors].sort().values for _ in range(rows)])
    draw[-1, -3:] = -1
    documents = torch.zeros(rows, context, dtype=torch.long)
    documents[-1, context // 2 :] = -1
    slots = anchors * block_size
    tensors = [
        torch.randn(rows, heads, length, head_dim, device="cuda")
        .bfloat16()  # so that all dtypes begin with the same numbers
        .to(dtype)
        .requires_grad_()
        for heads, length in ((6, slots), (2, context + slots), (2, context + slots))
    ]
    visibility = build_visibility(
        draw.cuda(), documents.cuda(), block_size, kind, head_dim, layer, groups=3
    )
    out = attend(*tensors, visibility)
    out.float().square().sum().backward()
    return [out, *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("context", [256, 333, 1000])
@pytest.mark.parametrize("anchors", [13, 64])
@pytest.mark.parametrize("layer", [FULL, LayerAttention(100, True), LayerAttention(100)])
@pytest.mark.parametrize("rows", [1, 2])
def test_flex_equals_sdpa_forward_and_backward(context, anchors, layer, rows):
    for mine, theirs in zip(
        run("flex", context, anchors, torch.float32, layer, rows=rows),
        run("sdpa", context, anchors, torch.float32, layer, rows=rows),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("context", [333, 1024])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_for_16_bits_are_as_near_to_fp32_as_sdpa_is(head_dim, context, rows):
    found = {
        (kind, dtype): run(kind, context, 64, dtype, head_dim=head_dim, rows=rows)
        for kind, dtype in (
            ("flex", torch.bfloat16),
            ("sdpa", torch.bfloat16),
            ("sdpa", torch.float32),
        )
    }
    exact = found["sdpa", torch.float32]
    mine, theirs = (
        [float((a.float() - b).norm() / b.norm()) for a, b in zip(one, exact, strict=True)]
        for one in (found["flex", torch.bfloat16], found["sdpa", torch.bfloat16])
    )
    assert all(a < 1.5 * b + 1e-3 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def test_auto_takes_flex_for_large_work_and_sdpa_for_small():
    for anchors, expected in ((512, "flex"), (4, "sdpa")):
        drawn = torch.arange(anchors, device="cuda").unsqueeze(0)
        assert choose_attention("auto", drawn, 2048, 16, head_dim=64) == expected


def test_a_new_context_length_does_not_compile_again():
    from torch._dynamo.utils import counters

    for context in (300, 450, 517):  # the first ones teach it which sizes move
        run("flex", context, 40, torch.bfloat16)
    counters.clear()
    before = counters["stats"]["unique_graphs"]
    for context in (612, 777, 901, 1033):
        run("flex", context, 40, torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == before
