"""Guards C5: accepted length measured against a precomputed text instead of this run's own."""

from __future__ import annotations

import pytest
import torch

from drafter.decoding import decode_plainly, decode_speculatively

V, BLOCK_SIZE = 11, 5


def greedy_next(text):
    """The target's argmax: depends on the whole text, so one other token changes all later ones."""
    return sum((place + 1) * (token + 1) for place, token in enumerate(text)) % (V - 1)


class RoundedTarget:
    """A target whose wide passes round one logit otherwise than its one-token passes."""

    def __init__(self, diverges_at):
        self.diverges_at = diverges_at

    def prefill(self, prompt_ids):
        self.text = tuple(prompt_ids)
        self.start = len(self.text)
        return self._logits(self.text, False)

    def verify(self, block_ids):
        self.block, wide = tuple(block_ids), len(block_ids) > 1
        ends = range(1, len(self.block) + 1)
        return torch.stack([self._logits(self.text + self.block[:end], wide) for end in ends])

    def commit(self, count):
        self.text += self.block[:count]

    def _logits(self, text, wide):
        token = greedy_next(text)
        if wide and len(text) - self.start == self.diverges_at:
            token = (token + 1) % (V - 1)
        return torch.nn.functional.one_hot(torch.tensor(token), V).float()


class Oracle:
    """Drafts what the target's one-token passes would say after this run's committed text."""

    block_size = BLOCK_SIZE

    def __init__(self, target):
        self.target = target

    def draft(self, anchor_id):
        text, logits = (*self.target.text, anchor_id), torch.zeros(BLOCK_SIZE - 1, V)
        for slot in range(BLOCK_SIZE - 1):
            text += (greedy_next(text),)
            logits[slot, text[-1]] = 1
        return logits


# The rounds of a drafter that is always right end at tokens 5 (the bonus of the first), 10, 15, ...
@pytest.mark.parametrize(("diverges_at", "cut_rounds"), [(10, 0), (11, 1), (12, 1), (14, 1)])
@pytest.mark.parametrize("max_new_tokens", [40, 41, 44])
def test_a_divergence_costs_its_own_round_and_no_later_one(diverges_at, cut_rounds, max_new_tokens):
    limits = {"max_new_tokens": max_new_tokens, "eos_token_ids": (V - 1,)}
    plain = decode_plainly(RoundedTarget(diverges_at), [3, 1], **limits)
    target = RoundedTarget(diverges_at)
    decoded = decode_speculatively(target, Oracle(target), [3, 1], **limits)
    assert decoded.ids[:diverges_at] == plain.ids[:diverges_at]
    assert decoded.ids[diverges_at] != plain.ids[diverges_at]
    # measured against `plain`, most later drafts would count as wrong
    assert decoded.ids[diverges_at:] != plain.ids[diverges_at:]
    cut = [r for r in decoded.rounds if r.unclipped < BLOCK_SIZE]
    assert len(cut) == cut_rounds
    assert sum(decoded.round_lengths) == len(decoded.ids) - 1 == max_new_tokens - 1
