"""The speculative decoding loop with several drafts at once: a tree, verified in one target pass.

Legend: N drafted slots, n nodes of a tree, V vocabulary.

A target that runs one node after the other, with nothing but the cache, is the slow twin in tests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drafter.decoding import CachedTarget, Clock, Decoded, DrafterEngine, choose
from drafter.sampling import GREEDY, GeneratorSource, RandomSource, Sampling, argmax
from drafter.search import ROOT, Search, TokenTree, grow
from drafter.verification import Verdict, clip_round, verify_tree


class TreeEngine(Protocol):
    """The target side of the loop."""

    def prefill(self, prompt_ids: Sequence[int]) -> Tensor:
        """As `drafter.decoding.TargetEngine`."""
        ...

    def verify_tree(self, anchor_id: int, tree: TokenTree) -> Tensor:
        """Runs the anchor and a tree behind the cache; returns logits (1 + n, V), its places'."""
        ...

    def commit_path(self, path: Sequence[int]) -> None:
        """Keeps the anchor and these places of the tree just run, and drops the others."""
        ...


def decode_with_search(
    target: TreeEngine,
    drafter: DrafterEngine,
    prompt_ids: Sequence[int],
    *,
    search: Search,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    sampling: Sampling = GREEDY,
    source: RandomSource | None = None,
    seed: int = 0,
    key: int = 0,
) -> Decoded:
    """Returns the target's own response, by sample-and-match through trees of drafts.

    The target's choices use the source as `decode_plainly` does: a number a token, in order. So
    the text is the same to the token, rounding of the target's passes apart, also when sampled.

    Args:
        target: Fresh for each prompt.
        drafter: Likewise.
        prompt_ids: At least one token.
        search: How a drafter pass becomes a tree.
        max_new_tokens: At least 1.
        eos_token_ids: Any of them ends the response.
        sampling: Of the target.
        source: Its random decisions; needed unless greedy.
        seed: Of the drafts that are drawn.
        key: The prompt's, likewise.
    """
    source = source or GeneratorSource(torch.Generator().manual_seed(0))
    clock = Clock()
    first_logits = target.prefill(prompt_ids)
    clock.lap("prefill", first_logits)
    first = choose(first_logits, sampling, source)
    out = Decoded([first], finished=first in eos_token_ids)
    while not out.finished and len(out.ids) < max_new_tokens:
        draft_logits = drafter.draft(out.ids[-1])
        uniforms = search.uniforms(seed, key, len(out.ids) - 1, 1, len(draft_logits))
        (tree,) = grow(search, draft_logits[None], uniforms)
        clock.lap("draft", draft_logits)
        target_logits = target.verify_tree(out.ids[-1], tree)
        clock.lap("verify", target_logits)
        path, following = _follow(tree, target_logits, sampling, source)
        round_ = clip_round(
            [tree.tokens[place] for place in path],
            Verdict(len(path), following),
            eos_token_ids=eos_token_ids,
            remaining=max_new_tokens - len(out.ids),
            block_size=drafter.block_size,
        )
        # the anchor and all but the newest emitted token have been run
        target.commit_path(path[: round_.length - 1])
        out.take(round_, argmax(draft_logits).tolist(), eos_token_ids)
        out.trees.append(tree.depths)
        clock.lap("bookkeeping", target_logits)
    out.seconds = clock.seconds
    return out


def _follow(
    tree: TokenTree, logits: Tensor, sampling: Sampling, source: RandomSource
) -> tuple[list[int], int]:
    if sampling.greedy:
        wanted = argmax(logits).tolist()
        return verify_tree(tree, lambda place: int(wanted[place + 1]))
    return verify_tree(tree, lambda place: choose(logits[place + 1], sampling, source))


class CachedTreeTarget(CachedTarget):
    """`TreeEngine` over a `Target` session; hands committed features to the drafter."""

    def verify_tree(self, anchor_id: int, tree: TokenTree) -> Tensor:
        """See `TreeEngine`."""
        ids, depths = [anchor_id, *tree.tokens], [0, *tree.depths]
        # the anchor is row 0, a place of the tree the row after its own number
        seen = torch.eye(len(ids), dtype=torch.bool)
        for row, parent in enumerate(tree.parents, 1):
            seen[row] |= seen[parent - ROOT]
        device = self._target.device
        last_hidden, self._block_taps = self.session.forward_tree(
            torch.tensor(ids, device=device),
            torch.tensor(depths, device=device),
            seen.to(device),
            self._layer_ids,
            self._target.tree_masks,
        )
        self.passes += 1
        self._block = ids
        return self._target.head.logits(last_hidden)

    def commit_path(self, path: Sequence[int]) -> None:
        """See `TreeEngine`."""
        assert self._block_taps is not None
        rows = [0, *(place - ROOT for place in path)]
        index = torch.tensor(rows, device=self._block_taps.device)
        self._taps.append(self._block_taps[index])
        self.session.keep(len(self.committed), index)
        self.committed += [self._block[row] for row in rows]
