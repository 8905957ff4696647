"""What a divergence from the target's distribution needs of it: one mean row of the head a token.

Legend: P positions, T slots, D hidden size, V vocabulary, C positions in a chunk.

With a frozen head W the drafter's logits are linear in its state h, so their mean under the
target's distribution p is scale * (h @ E_p[W] + E_p[b]), and

    KL(p || q) = log Z_q - E_p[z_q] - H(p).

p itself is needed once a position, however many blocks cover it: a slot takes D numbers and the
entropy, not V.

On a CPU a low-precision head's logits are rounded to its dtype, and KL with them; on a GPU they
are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafter.errors import UserError
from drafter.head import FrozenHead, mean_logit, weighted_rows


class SoftLabels(NamedTuple):
    """The target's distribution p of the next token, as far as KL(p || q) needs it."""

    rows: Tensor
    """(P, D) fp32 (fp64 for an fp64 head), E_p[W_v]."""
    bias: Tensor | None
    """(P,), E_p[b_v]; None for a head without bias."""
    entropy: Tensor
    """(P,), H(p) in nats."""

    def packed(self) -> Tensor:
        """Returns (P, D + 1 or D + 2), all of it side by side."""
        parts = [self.rows, self.entropy.unsqueeze(-1)]
        return torch.cat(parts if self.bias is None else [*parts, self.bias.unsqueeze(-1)], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, head: FrozenHead) -> SoftLabels:
        """Returns what `packed` (P, D + 1 or D + 2) was made of, for the same head."""
        width = head.weight.shape[1]
        bias = None if head.bias is None else packed[:, width + 1]
        return cls(packed[:, :width], bias, packed[:, width])

    def at(self, where: Tensor | slice) -> SoftLabels:
        """Returns those at positions (T,), or of a run of positions."""
        bias = None if self.bias is None else self.bias[where]
        return SoftLabels(self.rows[where], bias, self.entropy[where])


def check_linear(head: FrozenHead) -> None:
    """Raises UserError if a head caps its logits (Gemma 2): they are not linear in the state."""
    if head.softcap is not None:
        raise UserError(
            "KL to the target's distribution (model.loss.alpha_kl, losses.ForwardKL, "
            "losses.Overlap's blend) does not go with a target that caps its logits "
            "(final_logit_softcapping); leave it out (--model.loss.alpha_kl 0), or take "
            "losses.Overlap with form linear or log."
        )


@torch.no_grad()
def soft_labels(
    head: FrozenHead, last_hidden_PD: Tensor, chunk_rows: int | None = None
) -> SoftLabels:
    """Returns the soft labels that the target gives; no gradient.

    Args:
        head: The target's frozen head.
        last_hidden_PD: (P, D) what it reads at the position before each label.
        chunk_rows: Positions per chunk; default by the head.

    Raises:
        UserError: See `check_linear`.
    """
    check_linear(head)
    size = chunk_rows or head.chunk_rows()
    with torch.autocast(last_hidden_PD.device.type, enabled=False):
        chunks = [_of_chunk(head, chunk_CD) for chunk_CD in last_hidden_PD.split(size)]
    rows, biases, entropies = zip(*chunks, strict=True)
    bias = None if head.bias is None else torch.cat(biases)
    return SoftLabels(torch.cat(rows), bias, torch.cat(entropies))


def _of_chunk(head: FrozenHead, hidden_CD: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns rows (C, D), bias (C,) or None and entropy (C,)."""
    logits_CV = head.logits(hidden_CD)
    top_C1 = logits_CV.amax(dim=-1, keepdim=True)
    exp_CV = logits_CV.sub_(top_C1).exp_()  # one (C, V) buffer serves both
    total_C1 = exp_CV.sum(dim=-1, keepdim=True)
    bias_C = None
    if head.bias is not None:
        bias_C = (exp_CV @ head.bias.to(exp_CV.dtype).unsqueeze(-1) / total_C1).squeeze(-1)
    rows_CD = weighted_rows(head, exp_CV.to(head.weight.dtype)) / total_C1
    log_total_C = (top_C1 + total_C1.log()).squeeze(-1)
    # H(p) = log Z - E_p[z], its mean by the same rows as KL's: equal distributions give 0
    return rows_CD, bias_C, log_total_C - mean_logit(head, hidden_CD, rows_CD, bias_C)
