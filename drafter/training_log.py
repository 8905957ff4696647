"""Sums of a step's terms, so that logged values are sums of numerators over sums of denominators.

Legend: M blocks, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from drafter.metrics import prefix_match_lengths
from losses.combined import LossOutput
from losses.confidence import calibration
from losses.ratio import Ratio
from losses.scores import BlockScores

ACCEPTED_LENGTH = "accepted_length"
OUTSIDE = "outside_draft_vocabulary"
GRADIENT_PREFIX = "grad_norm/"


class WindowLog:
    """Adds up micro-batches; `pop` reduces over ranks once and starts again."""

    def __init__(self) -> None:
        self._sums: dict[str, Ratio] = {}
        self._gradients: dict[str, Tensor] = {}

    def add(self, out: LossOutput, scores: BlockScores) -> None:
        """Adds a micro-batch's terms, the accepted length of its blocks, and `calibration`.

        The accepted length is an estimate from teacher-forced blocks: matching prefix plus the
        bonus, averaged over blocks with a valid slot. With a reduced draft vocabulary the share of
        scored labels that lie outside it is added, too.
        """
        ratios = {name: ratio.detach() for name, ratio in out.terms.items()}
        lengths_M = prefix_match_lengths(scores.correct, scores.valid)
        blocks = scores.valid[:, 0].sum()
        ratios[ACCEPTED_LENGTH] = Ratio((lengths_M.sum() + blocks).float(), blocks.float())
        if scores.outside is not None:
            ratios[OUTSIDE] = Ratio(scores.outside.sum().float(), scores.valid.sum().float())
        ratios |= calibration(scores)
        for name, ratio in ratios.items():
            self._sums[name] = self._sums[name] + ratio if name in self._sums else ratio

    def add_gradients(self, out: LossOutput, parameters: Sequence[nn.Parameter]) -> None:
        """Adds every weighted term's gradient: one backward pass a term, no forward."""
        for name, term in out.contributions.items():
            if not term.requires_grad:
                continue
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
            before = self._gradients.get(name)
            self._gradients[name] = flat if before is None else before + flat

    def pop(
        self,
        reduce: Callable[[Tensor], Tensor],
        weights: dict[str, float],
    ) -> dict[str, Tensor]:
        """Returns each term unweighted, `loss` (their weighted sum) and gradient norms.

        Args:
            reduce: Sums a vector over ranks; called once, and once per logged gradient.
            weights: Weight of each term in the total, with its sign.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        pairs = [self._sums[name] for name in names]
        flat = torch.stack([part.float() for r in pairs for part in (r.numerator, r.denominator)])
        total = reduce(flat).view(-1, 2)
        values = {name: Ratio(total[i, 0], total[i, 1]).value for i, name in enumerate(names)}
        values["loss"] = torch.stack([w * values[name] for name, w in weights.items()]).sum()
        for name, gradient in self._gradients.items():
            values[GRADIENT_PREFIX + name] = reduce(gradient).norm()
        self._sums, self._gradients = {}, {}
        return values
