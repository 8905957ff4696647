"""Guards recorded trees and cut drafts on a GPU: tokens and rounds are those of the loops there."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from drafter.evaluation.trajectories import EvalPrompt
from drafter.sampling import GREEDY
from drafter.static_search import StaticSearchDecoder
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.test_static_search import NEW, PLANS, PROMPTS, WARM, assert_same, decoder_for, fast, slow
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request):
    model = tiny_model(tiny_config(request.param))
    target = Target(Loaded(model, tiny_tokenizer()), "tiny", None)
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS[:3])]
    drafter = overfitted_drafter(target, prompts, block_size=5, new_tokens=NEW, steps=25)
    return Target(Loaded(model.cuda(), target.tokenizer), "tiny", None), drafter.cuda()


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.label)
@torch.no_grad()
def test_recorded_rounds_are_the_loops(pair, plan, sampling):
    decoder = decoder_for(pair, plan, sampling=sampling)
    for _ in range(2):
        for place, ours in enumerate(fast(decoder)):
            loops = slow(pair, plan, place, sampling=sampling)
            # nodes that are all but equally likely change places: a pass of other shapes rounds
            # otherwise there
            assert [len(tree) for tree in ours.trees] == [len(tree) for tree in loops.trees]
            assert_same(ours, dataclasses.replace(loops, trees=ours.trees))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.label)
@torch.no_grad()
def test_bf16_stays_finite(pair, plan):
    model = tiny_model(tiny_config()).cuda().to(torch.bfloat16)
    target = Target(Loaded(model, tiny_tokenizer()), "tiny", None)
    drafter = copy.deepcopy(pair[1]).to(torch.bfloat16)
    decoder = StaticSearchDecoder(target, drafter, plan, length=60)
    for one in decoder.decode(PROMPTS[:2], max_new_tokens=12, eos_token_ids=()):
        assert len(one.ids) == 12
    assert torch.isfinite(decoder._taps).all()
    assert torch.isfinite(decoder._told).all()
