"""Guards recorded decoding on a GPU: tokens, rounds and drafts are those of the loop there."""

from __future__ import annotations

import pytest
import torch

from drafter.evaluation.measure import keyed_source
from drafter.evaluation.trajectories import EvalPrompt
from drafter.sampling import GREEDY, Sampling
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.test_static_decoding import PROMPTS, in_memory, slow
from tests.tiny_drafters import overfitted_drafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 48


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7)], ids=["greedy", "warm"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_recorded_rounds_are_the_loops(family, sampling):
    target = in_memory(family)
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)]
    with torch.enable_grad():
        drafter = overfitted_drafter(target, prompts)
    target = Target(Loaded(target.model.cuda(), target.tokenizer), "in memory", None)
    drafter = drafter.cuda()
    for one in (drafter, None):
        for rows in (1, 3):
            decoder = StaticDecoder(target, one, rows=rows, length=64, sampling=sampling)
            for again in range(2):
                sources = [keyed_source(3, place) for place in range(len(PROMPTS))]
                found = decoder.decode(
                    PROMPTS, max_new_tokens=NEW, eos_token_ids=(), sources=sources
                )
                for place, ours in enumerate(found):
                    theirs = slow(target, one, PROMPTS[place], place, NEW, sampling, ends=())
                    assert (ours.ids, ours.rounds, ours.drafts) == (
                        theirs.ids,
                        theirs.rounds,
                        theirs.drafts,
                    ), (rows, again, place)
