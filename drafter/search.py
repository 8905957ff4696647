"""Several drafts out of one drafter pass, as a tree of tokens that the target verifies at once.

Legend: T anchors, N drafted slots, V vocabulary, R most probable tokens of a slot, M drafts, n
nodes of a tree.

A block-diffusion drafter gives N independent marginals. A tree may take the most probable
sequences under their product (best first, within a budget of nodes), or M drafts drawn from them,
whose common beginnings are merged. Verification follows the target's own tokens through it
(`drafter.verification.verify_tree`): exact for any tree, since none depends on these tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drafter.errors import UserError
from drafter.sampling import (
    STREAM_SEARCH,
    Sampling,
    argmax,
    draw_several,
    keyed_uniforms,
    warp,
)

ROOT = -1
"""Parent of a tree's first tokens: the anchor."""
NO_TOKEN = -1


@dataclass(frozen=True)
class Search:
    """How one drafter pass becomes a tree.

    Args:
        kind: `tree`, the most probable sequences; or `self-select`, the argmax draft and others
            drawn from the marginals, of which the target's tokens select one.
        budget: Nodes of a tree; the target runs so many tokens, and the anchor, in a pass.
        drafts: M, the argmax draft included.

    Raises:
        UserError: A number is not positive.
    """

    kind: Literal["tree", "self-select"] = "tree"
    budget: int = 60
    drafts: int = 4

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("drafts", self.drafts)):
            if value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1.")

    @property
    def label(self) -> str:
        """In tables, and in the keys of what is kept.

        Example:
            >>> Search("tree", budget=60).label, Search("self-select", drafts=4).label
            ('tree of 60', '4 drafts')
        """
        if self.kind == "tree":
            return f"tree of {self.budget}"
        return "1 draft" if self.drafts == 1 else f"{self.drafts} drafts"

    def uniforms(self, seed: int, key: int, place: int, count: int, slots: int) -> Tensor:
        """Returns (count, M - 1, slots) fp64: what drafts from response tokens `place` ... take.

        A function of (seed, prompt, place) alone: replay and the loop draw the same drafts.
        """
        each = (self.drafts - 1) * slots if self.kind == "self-select" else 0
        found = np.zeros(0)
        if each:
            found = keyed_uniforms(seed, key, count * each, STREAM_SEARCH, start=place * each)
        return torch.from_numpy(found).view(count, -1, slots)


class TokenTree(NamedTuple):
    """Drafted tokens behind an anchor; parents come before their children."""

    tokens: list[int]
    parents: list[int]
    """Place of each one's parent, or ROOT; no two children of one parent are the same token."""

    @property
    def depths(self) -> list[int]:
        """Tokens from the anchor to each, 1 for its children.

        Example:
            >>> TokenTree([5, 6, 7], [ROOT, 0, ROOT]).depths
            [1, 2, 1]
        """
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def children(self) -> dict[tuple[int, int], int]:
        """Returns (parent, token) -> place."""
        pairs = zip(self.parents, self.tokens, strict=True)
        return {pair: place for place, pair in enumerate(pairs)}

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """Returns the places of the longest beginning of `tokens` that is in the tree.

        Example:
            >>> TokenTree([5, 6, 7], [ROOT, 0, ROOT]).follow([5, 6, 9])
            [0, 1]
        """
        left = iter(tokens)
        return self.walk(lambda _: next(left, NO_TOKEN))[0]

    def walk(self, choose: Callable[[int], int]) -> tuple[list[int], int]:
        """Goes from the anchor to the child that is the chosen token, as long as there is one.

        Args:
            choose: Gives the token behind a place, or behind the anchor (ROOT).

        Returns:
            The places gone through, and the token that was not there.
        """
        children, path, at = self.children(), list[int](), ROOT
        while True:
            token = choose(at)
            if (at, token) not in children:
                return path, token
            at = children[at, token]
            path.append(at)


def best_first(
    log_probs: Sequence[Sequence[float]], ids: Sequence[Sequence[int]], budget: int
) -> TokenTree:
    """Returns the `budget` beginnings that are most probable under a product of marginals.

    Every beginning of one that is taken is taken: it is at least as probable. Candidates come from
    a heap: of a sequence, the one that is a token longer, and the one whose last token is the next
    in order. So each is met once, and the work is in the budget, not in V or N.

    Args:
        log_probs: (N, R), each slot's most probable tokens, falling.
        ids: (N, R), these tokens. R no smaller than the budget loses nothing.
        budget: Nodes; fewer come back only if no more sequences have a probability above 0.

    Example:
        >>> best_first([[-0.1, -2.4], [-0.7, -0.8]], [[5, 6], [7, 8]], budget=3)
        TokenTree(tokens=[5, 7, 8], parents=[-1, 0, 0])
    """
    tokens: list[int] = []
    parents: list[int] = []
    # (-log-probability, parent's depth and place, rank, log-probability of the parent)
    heap = [(-log_probs[0][0], 0, ROOT, 0, 0.0)] if log_probs else []
    while heap and len(tokens) < budget:
        cost, depth, parent, rank, before = heapq.heappop(heap)
        if cost == math.inf:  # so is what is left: tokens outside a reduced draft vocabulary
            break
        place = len(tokens)
        tokens.append(ids[depth][rank])
        parents.append(parent)
        if rank + 1 < len(ids[depth]):
            sibling = before + log_probs[depth][rank + 1]
            heapq.heappush(heap, (-sibling, depth, parent, rank + 1, before))
        if depth + 1 < len(ids):
            child = -cost + log_probs[depth + 1][0]
            heapq.heappush(heap, (-child, depth + 1, place, 0, -cost))
    return TokenTree(tokens, parents)


def merged(drafts: Sequence[Sequence[int]]) -> TokenTree:
    """Returns drafts as a tree, common beginnings once.

    Example:
        >>> merged([[5, 6, 7], [5, 8, 7], [5, 6, 7]])
        TokenTree(tokens=[5, 6, 7, 8, 7], parents=[-1, 0, 1, 0, 3])
    """
    tree = TokenTree([], [])
    children: dict[tuple[int, int], int] = {}
    for draft in drafts:
        at = ROOT
        for token in draft:
            if (at, token) not in children:
                children[at, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(at)
            at = children[at, token]
    return tree


def grow(search: Search, logits_TNV: Tensor, uniforms_TMN: Tensor) -> list[TokenTree]:
    """Returns the tree of each anchor.

    Args:
        search: How.
        logits_TNV: (T, N, V) of the drafter.
        uniforms_TMN: (T, M - 1, N) of `Search.uniforms`.
    """
    return build(search, candidates(search, logits_TNV, uniforms_TMN))


def candidates(search: Search, logits_TNV: Tensor, uniforms_TMN: Tensor) -> Tensor:
    """Returns what trees are built from: the part of `grow` that runs on the device.

    Arguments are those of `grow`.

    Returns:
        fp64, which holds ids exactly: (T, N, 2, R), log-probabilities and ids of each slot's most
        probable tokens; or (T, M, N), ids of the drafts.
    """
    if search.kind == "tree":
        logits_TNV = logits_TNV if logits_TNV.dtype == torch.float64 else logits_TNV.float()
        top_TNR, ids_TNR = _top(logits_TNV, candidates_shape(search, *logits_TNV.shape[1:])[-1])
        log_probs_TNR = top_TNR.double() - logits_TNV.logsumexp(-1, keepdim=True)
        return torch.stack((log_probs_TNR, ids_TNR.double()), 2)
    others_TNM = draw_several(warp(logits_TNV, Sampling(1.0)), uniforms_TMN.transpose(1, 2))
    drafts_TMN = torch.cat((argmax(logits_TNV)[:, None], others_TNM.transpose(1, 2)), 1)
    return drafts_TMN.double()


def candidates_shape(search: Search, slots: int, vocab_size: int) -> tuple[int, ...]:
    """Returns what `candidates` gives of each anchor: (N, 2, R) or (M, N)."""
    if search.kind == "tree":
        return slots, 2, min(search.budget, vocab_size)
    return search.drafts, slots


def build(search: Search, found: Tensor) -> list[TokenTree]:
    """Returns the tree of each anchor: the part of `grow` that runs on the host.

    Args:
        search: How.
        found: Of `candidates`.
    """
    if search.kind == "tree":
        pairs = zip(found[:, :, 0].tolist(), found[:, :, 1].long().tolist(), strict=True)
        return [best_first(log_probs, ids, search.budget) for log_probs, ids in pairs]
    return [merged(drafts) for drafts in found.long().tolist()]


def _top(logits_TNV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the largest logits (T, N, R) and their ids, falling; equal ones by rising id.

    torch.topk orders equal ones as it pleases; which of those that tie at the cut are left out is
    left to it.
    """
    ids_TNR = logits_TNV.topk(count).indices.sort(-1).values
    top = logits_TNV.gather(-1, ids_TNR).sort(stable=True, dim=-1, descending=True)
    return top.values, ids_TNR.gather(-1, top.indices)
