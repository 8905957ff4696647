"""Muon for a drafter's matrices, AdamW for its vectors, as one optimizer that never waits.

`torch.optim.Muon` is the slow twin: it takes matrices one at a time, and takes a step whatever the
gradient is. Here matrices of one shape go through the iteration together, and a step whose gradient
is not finite changes nothing, as with fused AdamW (`found_inf`, see drafter.guard).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7

PRODUCTS = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""In what the iterations run, by device: in bf16 as torch's where that is fast; a CPU's products in
bf16 can take a hundred times as long as in fp32."""

MOST_VALUES = 1 << 26
"""Values of matrices that are stepped together, which takes about five times their memory (256 MiB
in fp32) for a while; one matrix may be larger."""


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal part of a matrix's momentum; vectors take AdamW's step.

    The update of an (A, B) matrix is scaled by 0.2 sqrt(max(A, B)), which gives it the size of
    AdamW's, though it bears a larger learning rate.
    Source: Jordan, https://kellerjordan.github.io/posts/muon; scale: arXiv 2502.16982.

    Args:
        matrices: Of 2 dimensions.
        vectors: All others.
        lr: Learning rate of both.
        betas: AdamW's moment decays.
        momentum: Decay of the matrices' momentum (Nesterov's).
        weight_decay: On matrices.
        fused: AdamW's kernels, for vectors.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        vectors: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        groups = [
            {"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum},
            {"params": list(vectors), "weight_decay": 0.0, "betas": betas},
        ]
        super().__init__(groups, {"lr": lr})
        self._adamw = torch.optim.AdamW([torch.zeros(0)], lr=lr, fused=fused)
        for key, value in self._adamw.defaults.items():
            self.param_groups[1].setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step; none if `found_inf` (a 0-d tensor on the device) is 1."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, vectors = self.param_groups
        self._step_matrices(matrices)
        # the vectors' state and settings are this optimizer's: AdamW only does the arithmetic
        self._adamw.param_groups = [vectors]
        self._adamw.state = self.state
        if hasattr(self, "found_inf"):
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, alike in by_shape.items():
            together = max(1, MOST_VALUES // shape.numel())
            for first in range(0, len(alike), together):
                self._step_alike(alike[first : first + together], group)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Steps matrices of one shape."""
        grads_NAB = torch.stack([p.grad for p in parameters if p.grad is not None])
        moments = [self._momentum(p) for p in parameters]
        new_NAB = torch.stack(moments).lerp_(grads_NAB, 1 - group["momentum"])
        update_NAB = orthogonal(grads_NAB.lerp(new_NAB, group["momentum"])).to(grads_NAB.dtype)
        update_NAB *= group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        if group["weight_decay"]:
            weights_NAB = torch.stack([p.detach() for p in parameters])
            update_NAB.add_(weights_NAB, alpha=group["lr"] * group["weight_decay"])
        if hasattr(self, "found_inf"):
            skip = self.found_inf > 0
            new_NAB = torch.where(skip, torch.stack(moments), new_NAB)
            update_NAB = torch.where(skip, 0.0, update_NAB)
        torch._foreach_copy_(moments, list(new_NAB))
        torch._foreach_sub_([p.detach() for p in parameters], list(update_NAB))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonal(matrices_NAB: Tensor) -> Tensor:
    """Returns about U V^T of each matrix U S V^T: singular values near 1, not equal to it.

    Five Newton-Schulz iterations with coefficients that drive small singular values up fast.

    Args:
        matrices_NAB: (N, A, B) floating.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    wide = matrices_NAB.to(PRODUCTS.get(matrices_NAB.device.type, torch.float32))
    wide = wide.mT if tall else wide
    # a Frobenius norm of 1 bounds the largest singular value
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide
