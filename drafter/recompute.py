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
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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


def keep_products_only(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`; its backward pass computes all but products and attention again.

    Args:
        function: Draws no random numbers.
        args: What it is given.
    """
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
