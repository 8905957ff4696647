"""AdamW or Muon with a linear warm-up and a cosine, and how a resumed run's settings win."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drafter.muon import Muon
from drafter.sharding import full

OptimizerKind = Literal["adamw", "muon"]
CLIP_EPSILON = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` adds it."""


@dataclass(frozen=True)
class OptimiserSettings:
    """The optimizer's settings.

    Args:
        learning_rate: Peak.
        weight_decay: On matrices; vectors (norms) have none.
        betas: AdamW's moment decays.
        warmup_fraction: Share of the steps with linear warm-up.
        final_lr_fraction: Learning rate at the end of the cosine, as a share of the peak.
        kind: `adamw`, or `muon` for the matrices (see `drafter.muon`).
        momentum: Muon's.
    """

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_fraction: float
    final_lr_fraction: float
    kind: OptimizerKind = "adamw"
    momentum: float = 0.95


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Returns the learning-rate factor in (0, 1] at an optimizer step.

    Args:
        step: Optimizer steps done.
        warmup: Steps of linear warm-up.
        total: Steps at which the cosine reaches `floor`.
        floor: Factor at the end.

    Example:
        >>> [round(warmup_cosine(step, warmup=2, total=10), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimiserSettings, total_steps: int, fused: bool
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Returns an optimizer over two groups (matrices, vectors) and its per-step schedule."""
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    optimizer: torch.optim.Optimizer
    if settings.kind == "muon":
        optimizer = Muon(
            matrices,
            vectors,
            lr=settings.learning_rate,
            betas=settings.betas,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
    else:
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=fused,
        )
    factor = learning_rate_factor(settings, total_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(settings: OptimiserSettings, total_steps: int) -> Callable[[int], float]:
    """Returns the factor of the learning rate by optimizer step."""
    warmup = math.ceil(settings.warmup_fraction * total_steps)

    def factor(step: int) -> float:  # a function: LambdaLR would save an object's settings
        floor = settings.final_lr_fraction
        return warmup_cosine(step, warmup=warmup, total=total_steps, floor=floor)

    return factor


def clip(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], limit: float
) -> Tensor:
    """Clips gradients by their norm, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        optimizer: About to step. A fused AdamW is told what to divide by (what a GradScaler sets)
            and does it as it reads the gradients; for others these are changed here.
        parameters: Trained.
        limit: Of the norm; 0 for none.

    Returns:
        (), the norm before clipping, over all ranks if gradients are sharded.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    whole_norm = full(norm)
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["fused"]:
        factor = ((whole_norm + CLIP_EPSILON) / limit).clamp(min=1.0) if limit else None
        optimizer.grad_scale = factor  # type: ignore[attr-defined]
    elif limit:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return whole_norm


def number_as_module(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, Any]:
    """Returns an optimizer's state with its parameters numbered in the module's order.

    torch numbers them in the order of the groups, and reads any numbering; FSDP2's checkpoints are
    numbered, and read, in the module's order. So all checkpoints are.

    Args:
        state: `optimizer.state_dict()`.
        optimizer: Whose state it is.
        module: Whose parameters it trains.
    """
    places = {id(parameter): place for place, parameter in enumerate(module.parameters())}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {old: places[id(parameter)] for old, parameter in enumerate(own)}
    return {
        "state": {number[old]: value for old, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[old] for old in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def apply_settings(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    settings: OptimiserSettings,
    total_steps: int,
) -> None:
    """Puts this run's settings over those that came with a resumed optimizer's state."""
    scheduler.base_lrs = [settings.learning_rate] * len(optimizer.param_groups)
    # the run's length may be known only now, with the checkpoint's (`schedule_origin`)
    scheduler.lr_lambdas = [learning_rate_factor(settings, total_steps)] * len(scheduler.base_lrs)
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    decays = (settings.weight_decay, 0.0)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["initial_lr"] = settings.learning_rate
        group["lr"] = settings.learning_rate * factor
        group["weight_decay"] = decay
        if "betas" in group:
            group["betas"] = settings.betas
        if "momentum" in group:
            group["momentum"] = settings.momentum
