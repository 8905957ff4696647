"""The exact rules that decide how much of a draft the target keeps, and where a round ends.

Legend: N drafted slots, V vocabulary. Distributions are rows of probabilities; p is the target's
(warped), q what the draft was really drawn from.

Acceptance is defined here and nowhere else; the decoding loop and replay call it by name.
Source: method.md, Exact verification and Rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.sampling import RandomSource
from drafter.search import TokenTree


class Verdict(NamedTuple):
    """What a target pass says of a draft.

    Attributes:
        accepted: Length of the accepted prefix, 0..N.
        next_token: The target's token after it: a correction, or the bonus after N accepts.
    """

    accepted: int
    next_token: int


class Round(NamedTuple):
    """A round after clipping at EOS and at the limit of new tokens.

    Attributes:
        tokens: Emitted tokens; their number is the round's length.
        accepted: Drafted tokens among them.
        unclipped: The length in tau_unclipped's convention (see `unclipped_length`).
        finished: Whether the response ends here.
    """

    tokens: list[int]
    accepted: int
    unclipped: int
    finished: bool

    @property
    def length(self) -> int:
        """Tokens emitted."""
        return len(self.tokens)


def verify_greedy(draft: Sequence[int], target_argmax: Sequence[int]) -> Verdict:
    """Accepts while the draft is the target's argmax.

    Args:
        draft: N token ids.
        target_argmax: N + 1 ids, the target's argmax after the anchor and after each draft token.

    Example:
        >>> verify_greedy([5, 6, 7], [5, 9, 7, 8])
        Verdict(accepted=1, next_token=9)
        >>> verify_greedy([5, 6], [5, 6, 8])
        Verdict(accepted=2, next_token=8)
    """
    assert len(target_argmax) == len(draft) + 1
    for k, (token, wanted) in enumerate(zip(draft, target_argmax, strict=False)):
        if token != wanted:
            return Verdict(k, int(wanted))
    return Verdict(len(draft), int(target_argmax[-1]))


def verify_rejection(
    draft: Sequence[int], q_NV: Tensor, p_MV: Tensor, source: RandomSource
) -> Verdict:
    """Speculative (rejection) sampling, exact for drafts x_k ~ q_k drawn independently.

    Accepts x_k with min(1, p_k(x)/q_k(x)); at the first rejection the next token comes from
    max(0, p - q), normalised (from p if that rounds to zero everywhere); after N accepts, from p.

    Args:
        draft: N token ids.
        q_NV: (N, V), the distributions that the draft was really drawn from: one-hot rows for
            argmax drafts. A soft q for argmax drafts would be biased.
        p_MV: (N + 1, V), the target's.
        source: Random decisions.
    """
    assert len(q_NV) == len(draft) == len(p_MV) - 1
    for k, token in enumerate(draft):
        p, q = float(p_MV[k, token]), float(q_NV[k, token])
        if not source.bernoulli(min(1.0, p / q) if q > 0 else 0.0):
            residual_V = (p_MV[k] - q_NV[k]).clamp(min=0)
            if not bool((residual_V > 0).any()):
                residual_V = p_MV[k]
            return Verdict(k, source.categorical(residual_V / residual_V.sum()))
    return Verdict(len(draft), source.categorical(p_MV[len(draft)]))


def verify_sample_and_match(draft: Sequence[int], p_MV: Tensor, source: RandomSource) -> Verdict:
    """Draws the target's token at each position and follows the draft while they agree.

    Exact for any draft whatsoever, however it was chosen; accepts less than `verify_rejection`.

    Args:
        draft: N token ids.
        p_MV: (N + 1, V).
        source: Random decisions.
    """
    for k, token in enumerate(draft):
        drawn = source.categorical(p_MV[k])
        if drawn != token:
            return Verdict(k, drawn)
    return Verdict(len(draft), source.categorical(p_MV[len(draft)]))


def verify_tree(tree: TokenTree, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Sample-and-match (greedy: argmax-and-match) through a tree of drafts.

    The target's token at each position is what it would be without a draft, so any tree is exact.

    Args:
        tree: Drafts.
        choose: Gives the target's token behind a place of the tree, or behind the anchor (ROOT);
            asked once for each token that the round emits, in order.

    Returns:
        Places of the accepted tokens, and the target's token after them.

    Example:
        >>> wanted = {-1: 5, 0: 8, 1: 4, 2: 3}
        >>> verify_tree(TokenTree([5, 6, 8], [-1, 0, 0]), wanted.__getitem__)
        ([0, 2], 3)
    """
    return tree.walk(choose)


def clip_round(
    draft: Sequence[int],
    verdict: Verdict,
    *,
    eos_token_ids: Collection[int],
    remaining: int,
    block_size: int,
) -> Round:
    """Ends a round at the first EOS or at the limit of new tokens.

    Args:
        draft: N token ids.
        verdict: Of this draft.
        eos_token_ids: Any of them ends the response, in whichever slot it stands.
        remaining: Tokens that may still be emitted, at least 1.
        block_size: K.
    """
    assert remaining >= 1
    tokens = [*draft[: verdict.accepted], verdict.next_token][:remaining]
    finished = len(tokens) == remaining
    for k, token in enumerate(tokens):
        if token in eos_token_ids:
            tokens, finished = tokens[: k + 1], True
            break
    accepted = min(verdict.accepted, len(tokens))
    cut_off = finished and accepted == len(tokens)
    unclipped = unclipped_length(accepted, cut_off, block_size)
    return Round(tokens, accepted, unclipped, finished)


def unclipped_length(accepted: int, cut_off: bool, block_size: int) -> int:
    """Returns a round's length for tau_unclipped.

    Published scripts do not clip the last round. What they would accept past the end is unknown
    here, so a round that the end cut off while every draft was right counts as a full block: an
    upper bound of what they print, and exactly K for a drafter that is always right.

    Args:
        accepted: Accepted tokens within the response.
        cut_off: Whether the response ended with an accepted token of this round.
        block_size: K.
    """
    return block_size if cut_off else accepted + 1


def one_hot(tokens: Sequence[int], vocab_size: int, like: Tensor) -> Tensor:
    """Returns (N, V): the distribution that argmax drafts are really drawn from."""
    index = torch.tensor(list(tokens), device=like.device).unsqueeze(-1)
    return torch.zeros(len(tokens), vocab_size, dtype=like.dtype, device=like.device).scatter_(
        -1, index, 1.0
    )
