"""Guards waste at a temperature: it is that of argmax drafts, whatever drafts were verified."""

from __future__ import annotations

import pytest
import torch

from drafter.decoding import decode_speculatively
from drafter.sampling import GeneratorSource, Sampling

V = 4


class FlatTarget:
    def prefill(self, prompt_ids):
        return torch.zeros(V)

    def verify(self, block_ids):
        return torch.zeros(len(block_ids), V)

    def commit(self, count):
        pass


class NearlyFlatDrafter:
    block_size = 4

    def draft(self, anchor_id):
        return torch.tensor([[0.0, 0.1, 0.0, 0.0]] * 3)


@pytest.mark.parametrize("rule", ["rejection", "rejection-argmax", "sample-and-match"])
def test_decoded_drafts_are_argmax_drafts(rule):
    decoded = decode_speculatively(
        FlatTarget(),
        NearlyFlatDrafter(),
        [0],
        max_new_tokens=60,
        eos_token_ids=(),
        sampling=Sampling(1.0),
        source=GeneratorSource(torch.Generator().manual_seed(0)),
        rule=rule,
    )
    assert decoded.drafts == [[1, 1, 1]] * len(decoded.rounds)
    if rule == "rejection":  # sampled drafts were verified, not these
        accepted = [r.tokens[: r.accepted] for r in decoded.rounds]
        assert any(token != 1 for tokens in accepted for token in tokens)
