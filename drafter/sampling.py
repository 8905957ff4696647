"""How a token is chosen from logits: warping, ties, and reproducible random numbers.

One room for the conventions that the target, the drafter and the verification must share
(method.md, Exact verification): the warp (temperature, then top-k, then top-p, renormalised), the
tie rule (the lowest id), and uniforms that depend on (seed, prompt, position, stream) alone.

Legend: V vocabulary, R positions of a response; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter.errors import UserError

# Streams of `keyed_uniforms`: independent sequences for one (seed, prompt).
STREAM_TARGET = 0  # the target's own tokens in a sampled trajectory
STREAM_THINNING = 1  # which of them count as accepted drafts, in replay
# 2 is `drafter.evaluation.measure.STREAM_DECODE`
STREAM_SEARCH = 3  # drafts that are drawn from the drafter's marginals

_UINT64_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How the target picks a token, and the drafter with it.

    Args:
        temperature: divides the logits; 0 is greedy decoding, where top_k and top_p do nothing.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: then keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps
            all.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"sampling: temperature is {self.temperature}; give 0 (greedy) or a positive number"
            )
        if self.top_k < 0:
            raise UserError(f"sampling: top_k is {self.top_k}; give 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p is {self.top_p}; give a number in (0, 1], 1 is off")

    @property
    def greedy(self) -> bool:
        """Whether tokens are the argmax, so that nothing is random."""
        return self.temperature == 0


GREEDY = Sampling()


def argmax(logits: Tensor) -> Tensor:
    """The most probable token; of equal ones the lowest id. `(..., V)` -> `(...)` long.

    torch.argmax promises the first index on ties; the test that holds it to this is ours, because
    the exactness of greedy decoding stands on it (draft, verify and scoring must break ties alike).
    """
    return logits.argmax(dim=-1)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities that tokens are drawn from: temperature, then top-k, then top-p, renormalised.

    Args:
        logits: `(..., V)`; float32 and float64 keep their dtype, lower precision becomes float32.
        sampling: temperature 0 gives the one-hot distribution of `argmax`.

    Returns:
        `(..., V)` probabilities. Ties at a cut are broken towards the lowest id, so the number of
        tokens kept by top-k is exactly k.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(-1, argmax(logits)[..., None], 1.0)
    # Subtracting the maximum first keeps tiny temperatures from overflowing to inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(~_top_k_mask(logits, sampling.top_k), -math.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        # A stable sort leaves equal probabilities in order of id.
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        keep_ordered = torch.ones_like(ordered, dtype=torch.bool)
        keep_ordered[..., 1:] = ordered.cumsum(dim=-1)[..., :-1] < sampling.top_p
        keep = torch.zeros_like(keep_ordered).scatter_(-1, order, keep_ordered)
        probs = probs.masked_fill(~keep, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def _top_k_mask(logits: Tensor, k: int) -> Tensor:
    """The k largest of `(..., V)`, ties to the lowest id (torch.topk breaks them as it pleases)."""
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    above = logits > threshold
    tied = logits == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws tokens by inverting the cumulative distribution; never one of probability 0.

    Args:
        probs: `(..., V)`, non-negative, not all zero; need not be normalised exactly.
        uniforms: `(...)` in [0, 1), any float dtype.

    Returns:
        `(...)` long: the lowest id whose cumulative mass exceeds its uniform. The sum runs in
        float64, so the same probabilities and uniforms give the same token on any device up to
        the rounding of that sum.
    """
    return draw_several(probs, uniforms[..., None])[..., 0]


def draw_several(probs: Tensor, uniforms: Tensor) -> Tensor:
    """As `draw`, several tokens of each distribution.

    Args:
        probs: `(..., V)`.
        uniforms: `(..., M)`.

    Returns:
        `(..., M)` long.
    """
    mass = probs.double().cumsum(dim=-1)
    level = uniforms.to(device=probs.device, dtype=torch.float64) * mass[..., -1:]
    ids = torch.searchsorted(mass, level.contiguous(), right=True)
    # Guards the one case that rounding could spoil: a level equal to the whole mass.
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).byte().argmax(dim=-1, keepdim=True)
    return torch.minimum(ids, last)


def keyed_uniforms(
    seed: int, prompt_id: int, count: int, stream: int, start: int = 0
) -> npt.NDArray[np.float64]:
    """Uniforms of positions start .. start + count - 1 of one prompt: a pure function of the key.

    Philox (Salmon et al. 2011) is counter-based: position i does not depend on how many numbers
    were drawn before, on batching, on ranks or on the device.

    Args:
        seed, prompt_id, stream: the key; non-negative integers.
        count: how many.
        start: the first position.

    Returns:
        `(count,)` float64 in [0, 1).
    """
    philox = np.random.Philox(
        counter=[0, 0, prompt_id & _UINT64_MASK, stream], key=[seed & _UINT64_MASK, 0]
    )
    # One counter step yields four 64-bit words; `advance` moves by whole steps.
    philox.advance(start // 4)
    words = philox.random_raw(start % 4 + count)[start % 4 :]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_uniform(seed: int, prompt_id: int, position: int, stream: int) -> float:
    """One number of `keyed_uniforms`: that of `position`."""
    return float(keyed_uniforms(seed, prompt_id, 1, stream, start=position)[0])


class RandomSource(Protocol):
    """Every random decision of a decoding loop, so that a test can take each branch in turn."""

    def bernoulli(self, prob: float) -> bool:
        """True with probability `prob` (in [0, 1])."""
        ...

    def categorical(self, probs: Tensor) -> int:
        """A token drawn from `probs` `(V,)`."""
        ...


class GeneratorSource:
    """The shipped `RandomSource`: uniforms of a torch.Generator on the CPU, whatever the device.

    Example:
        >>> source = GeneratorSource(torch.Generator().manual_seed(0))
        >>> source.bernoulli(1.0), source.bernoulli(0.0)
        (True, False)
        >>> source.categorical(torch.tensor([0.0, 1.0, 0.0]))
        1
    """

    def __init__(self, generator: torch.Generator) -> None:
        if generator.device.type != "cpu":
            raise ValueError("GeneratorSource: give it a generator on the CPU")
        self.generator = generator

    def bernoulli(self, prob: float) -> bool:
        return self.uniform().item() < prob

    def categorical(self, probs: Tensor) -> int:
        return int(draw(probs, self.uniform()))

    def uniform(self) -> Tensor:
        """The number that the next decision is made with: () float64 in [0, 1)."""
        return torch.rand((), generator=self.generator, dtype=torch.float64)
