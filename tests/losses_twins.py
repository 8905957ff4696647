"""Slow, obvious twins of the loss terms: float64 loops written straight from method.md.

No cumsum, no masks, no reductions: one scalar at a time, so that autograd through these loops is a
gradient oracle too. Positions count from 1 here, as in the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from losses import BlockScores


def random_scores(
    lengths: Sequence[int],
    num_slots: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    outside: float = 0.0,
) -> BlockScores:
    """Blocks with `lengths[m]` valid slots each; log_prob is a leaf that wants a gradient.

    Half the slots are correct on average; a wrong slot has q <= 1/2, as under an argmax. A share
    `outside` of the labels is outside a reduced draft vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), num_slots)
    valid = torch.arange(num_slots) < torch.tensor(list(lengths)).reshape(-1, 1)
    prob = 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    correct = torch.rand(shape, generator=generator) < 0.5
    prob = torch.where(correct, prob, prob / 2)
    log_prob = torch.where(valid, prob.log(), 0.0).to(dtype)
    if not outside:
        return BlockScores(log_prob.requires_grad_(), correct, valid)
    out = (torch.rand(shape, generator=generator) < outside) & valid
    log_prob = log_prob.masked_fill(out, -math.inf).requires_grad_()
    return BlockScores(log_prob, correct & ~out, valid, outside=out)


def weight(k: int, gamma: float) -> float:
    """w_k = exp(-(k-1)/gamma); gamma = inf is uniform."""
    return 1.0 if math.isinf(gamma) else math.exp(-(k - 1) / gamma)


def valid_positions(scores: BlockScores, m: int) -> list[int]:
    """The valid k of block m, from 1."""
    return [k for k in range(1, scores.valid.shape[1] + 1) if bool(scores.valid[m, k - 1])]


def nothing(scores: BlockScores) -> Tensor:
    """A connected zero, so that a sum over nothing still has a gradient."""
    log_prob = scores.log_prob.double()
    return torch.zeros((), dtype=torch.float64) * log_prob[log_prob.isfinite()].sum()


def surprise(scores: BlockScores, m: int, k: int) -> Tensor:
    """-log q_k(y_k) of block m; nothing where it is infinite, which no weight changes."""
    if scores.outside is not None and bool(scores.outside[m, k - 1]):
        return nothing(scores)
    return -scores.log_prob[m, k - 1].double()


def cross_entropy(scores: BlockScores, gamma: float) -> tuple[Tensor, float]:
    """(numerator, denominator) of L_ce."""
    numerator, denominator = nothing(scores), 0.0
    for m in range(len(scores.valid)):
        for k in valid_positions(scores, m):
            numerator = numerator + weight(k, gamma) * surprise(scores, m, k)
            denominator += weight(k, gamma)
    return numerator, denominator


def focal(
    scores: BlockScores, modulation: float = 0.0, gamma: float = math.inf
) -> tuple[Tensor, float]:
    """(numerator, denominator) of L_focal: the sum at j*, the blocks with an error."""
    numerator, denominator = nothing(scores), 0.0
    for m in range(len(scores.valid)):
        for k in valid_positions(scores, m):
            if not bool(scores.correct[m, k - 1]):
                loss = surprise(scores, m, k)
                if loss != 0:
                    loss = loss * (1 - (-loss).exp()) ** modulation
                numerator = numerator + weight(k, gamma) * loss
                denominator += 1
                break
    return numerator, denominator


def chain(scores: BlockScores, normalize: str = "block") -> tuple[Tensor, float]:
    """(numerator, denominator) of R."""
    numerator, denominator = nothing(scores), 0.0
    for m in range(len(scores.valid)):
        positions = valid_positions(scores, m)
        if not positions:
            continue
        block_sum = nothing(scores)
        for k in positions:
            product = torch.ones((), dtype=torch.float64)
            for j in range(1, k + 1):
                product = product * scores.log_prob[m, j - 1].double().exp()
            block_sum = block_sum + product
        length = {"block": scores.valid.shape[1], "valid": len(positions), "none": 1}[normalize]
        numerator = numerator + block_sum / length
        denominator += 1
    return numerator, denominator


def dpace(scores: BlockScores, smoothing: float = 0.5, part: str = "both") -> tuple[Tensor, float]:
    """(numerator, denominator) of D-PACE; weights are plain numbers, so nothing flows into them."""
    numerator, denominator = nothing(scores), 0.0
    for m in range(len(scores.valid)):
        positions = valid_positions(scores, m)
        smooth = {
            k: (1 - smoothing) * math.exp(scores.log_prob[m, k - 1].item()) + smoothing
            for k in positions
        }
        for j in positions:
            before = math.prod(smooth[i] for i in positions if i <= j)
            behind = [
                math.prod(smooth[i] for i in positions if j < i <= last)
                for last in positions
                if last >= j
            ]
            factor = {
                "both": before * sum(behind),
                "prefix": before,
                "continuation": sum(behind),
            }[part]
            numerator = numerator + factor * surprise(scores, m, j)
        denominator += bool(positions)
    return numerator, denominator


def accept_until_fail(scores: BlockScores) -> tuple[Tensor, float]:
    """(numerator, denominator) of cross-entropy up to the first error."""
    numerator, denominator = nothing(scores), 0.0
    for m in range(len(scores.valid)):
        for k in valid_positions(scores, m):
            numerator = numerator + surprise(scores, m, k)
            denominator += 1
            if not bool(scores.correct[m, k - 1]):
                break
    return numerator, denominator


def mean(pair: tuple[Tensor, float]) -> Tensor:
    """The quotient, 0 over nothing."""
    return pair[0] / pair[1] if pair[1] else pair[0]


def total(
    scores: BlockScores, gamma: float = 10.0, alpha_focal: float = 0.3, alpha_chain: float = 40.0
) -> Tensor:
    """L = L_ce + alpha_f L_focal - alpha_c R of a single process and batch."""
    return (
        mean(cross_entropy(scores, gamma))
        + alpha_focal * mean(focal(scores))
        - alpha_chain * mean(chain(scores))
    )


def gradient(value: Tensor, scores: BlockScores) -> Tensor:
    """d value / d log_prob, (M, N)."""
    (grad,) = torch.autograd.grad(value, scores.log_prob, retain_graph=True)
    return grad


def joined(parts: Sequence[BlockScores]) -> BlockScores:
    """All blocks in one batch, with a leaf of its own."""
    return BlockScores(
        torch.cat([p.log_prob.detach() for p in parts]).requires_grad_(),
        torch.cat([p.correct for p in parts]),
        torch.cat([p.valid for p in parts]),
    )
