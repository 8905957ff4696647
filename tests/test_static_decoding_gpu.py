"""Guards recorded decoding on a GPU: tokens, rounds and drafts are those of the loop there."""

from __future__ import annotations

import pytest
import torch

from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.evaluation.measure import keyed_source
from drafter.evaluation.trajectories import EvalPrompt
from drafter.sampling import GREEDY, Sampling
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 9, 3], [7, 1, 2, 8, 8, 4, 30, 11, 60, 61, 7], [100, 4, 2, 17], [12, 90, 41, 3, 9]]
NEW = 48


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7)], ids=["greedy", "warm"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_recorded_rounds_are_the_loops(family, sampling):
    target = Target(Loaded(tiny_model(tiny_config(family)), tiny_tokenizer()), "in memory", None)
    drafter = overfitted_drafter(target, [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)])
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
                    theirs = loop(target, one, place, sampling)
                    assert (ours.ids, ours.rounds, ours.drafts) == (
                        theirs.ids,
                        theirs.rounds,
                        theirs.drafts,
                    ), (rows, again, place)


def loop(target, drafter, place, sampling):
    settings = {
        "max_new_tokens": NEW,
        "eos_token_ids": (),
        "sampling": sampling,
        "source": keyed_source(3, place),
    }
    engine = CachedTarget(target, () if drafter is None else drafter.config.target_layer_ids)
    if drafter is None:
        return decode_plainly(engine, PROMPTS[place], **settings)
    own = CachedDrafter(drafter, target, engine)
    return decode_speculatively(engine, own, PROMPTS[place], **settings, rule="sample-and-match")
