from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ratio import Ratio


@dataclass
class LossOutput:
    total: Tensor
    terms: dict
    weights: dict
    contributions: dict


@dataclass
class CombinedLoss:
    """TEMP.

    Args:
        gamma: g
        alpha_focal: f
        alpha_chain: c
    """

    gamma: float = 10.0
    alpha_focal: float = 0.3
    alpha_chain: float = 40.0

    def weights(self, progress):
        return {"cross_entropy": 1.0, "focal": self.alpha_focal, "chain": -self.alpha_chain}

    def __call__(self, scores, progress, counts_N=None, reduce=None):
        lp, v = scores.log_prob, scores.valid
        N = lp.shape[1]
        k = torch.arange(N, device=lp.device)
        w = torch.exp(-k / self.gamma) if math.isfinite(self.gamma) else torch.ones(N, device=lp.device)
        vf = v.float()
        ce = Ratio(-(lp * vf * w).sum(), (vf * w).sum())
        u = Ratio(-(lp * vf).sum().detach(), vf.sum())
        wrong = v & ~scores.correct
        first = wrong & (wrong.long().cumsum(1) == 1)
        focal = Ratio(-(lp * first).sum(), first.float().sum())
        chain = Ratio(((lp.cumsum(1)).exp() * vf).sum() / N, vf[:, 0].sum())
        counts = vf.sum(0) if counts_N is None else counts_N.float()
        vec = torch.cat([counts, focal.denominator[None], vf[:, 0].sum()[None]])
        if reduce: vec = reduce(vec)
        counts = vec[:N]
        cce = ce.numerator / (counts * w).sum().clamp(min=1e-9)
        cf = self.alpha_focal * focal.numerator / vec[N].clamp(min=1e-9) * vec[N+1] / counts[0].clamp(min=1)
        cc = -self.alpha_chain * chain.numerator / counts[0].clamp(min=1)
        total = cce + cf + cc + 0.0 * lp.sum()
        terms = {"cross_entropy": ce, "cross_entropy_uniform": u, "focal": focal, "chain": chain}
        return LossOutput(total, terms, self.weights(progress), {"cross_entropy": cce, "focal": cf, "chain": cc})
