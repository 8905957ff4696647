"""What a compiled step keeps for its backward pass: products and attention, and nothing else.

What lies between them (norms, RoPE, SwiGLU's gate, weights in the products' dtype) is computed
again, as parts of kernels that run anyway; no product is. Without a compiler each of these would
be kernels of their own, so an eager step keeps what autograd keeps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from drafter.head import matmul_fp32

# torch warns of operations in place, of which there are none here
logging.getLogger("torch._higher_order_ops.wrap").addFilter(
    lambda record: "context_fn is passed" not in record.getMessage()
)

_KEPT = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    )
)

INDUCTOR_OPTIONS = {"unroll_reductions_threshold": 1}
"""Of a compiled step. Inductor makes sums of up to 8 terms within whatever reads them; 1 turns that
off. Else each layer's gradients of keys and values, which come in one part for each query head of a
group (`attend`), would be kept in parts until the context's turn comes, after all layers: 0.5 GiB
at 512 blocks of Llama-3-8B's width."""


def keep_products_only(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`; in a compiled training step its backward pass computes all but
    products and attention again.

    Args:
        function: Draws no random numbers.
        args: What it is given.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return function(*args)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _policy),
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T in the dtype of x; the gradient of `weight` comes in fp32.

    On a GPU it is not rounded to the dtype of x on the way.
    Autocast would keep a copy of the weight in the products' dtype for the backward pass, and turn
    a gradient of that dtype into fp32 in a kernel of its own.

    Args:
        x: (..., D) in the dtype of products.
        weight: (F, D) in fp32.
    """
    out: Tensor = _Product.apply(x, weight)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        return x @ weight_FD.to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight_FD = ctx.saved_tensors
        grad_x = grad @ weight_FD.to(x.dtype) if ctx.needs_input_grad[0] else None
        flat_TF, flat_TD = grad.flatten(0, -2), x.flatten(0, -2)
        return grad_x, matmul_fp32(flat_TF.t(), flat_TD).to(weight_FD.dtype)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
