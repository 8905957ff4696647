"""Guards decoding on fixed shapes: token by token and round by round it is the plain loop.

Slow twins: `decode_speculatively` and `decode_plainly`, whose caches grow and are cropped.
"""

from __future__ import annotations

import pytest
import torch

from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.errors import UserError
from drafter.evaluation.measure import keyed_source
from drafter.evaluation.trajectories import EvalPrompt
from drafter.sampling import GREEDY, Sampling
from drafter.static_decoding import StaticDecoder
from drafter.static_target import StaticTarget
from drafter.target import Target
from drafter.target_loading import Loaded
from drafter.target_masks import AttentionMasks
from tests.test_step_graphs import Tape
from tests.tiny import SLIDING_WINDOW, tiny_config, tiny_model, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

FAMILIES = ["llama", "qwen3", "gemma3"]
WARM = Sampling(temperature=0.7, top_k=20)
PROMPTS = [[5, 9, 3], [7, 1, 2, 8, 8, 4, 30, 11, 60, 61, 7], [100, 4, 2, 17], [12, 90, 41, 3, 9]]


def in_memory(family, **overrides):
    model = tiny_model(tiny_config(family, **overrides))
    return Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    target = in_memory(request.param)
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS[:3])]
    return target, overfitted_drafter(target, prompts)


def slow(target, drafter, prompt, place, new, sampling=GREEDY, ends=None):
    settings = {
        "max_new_tokens": new,
        "eos_token_ids": target.eos_token_ids if ends is None else ends,
        "sampling": sampling,
        "source": keyed_source(3, place),
    }
    engine = CachedTarget(target, () if drafter is None else drafter.config.target_layer_ids)
    if drafter is None:
        return decode_plainly(engine, prompt, **settings)
    own = CachedDrafter(drafter, target, engine)
    return decode_speculatively(engine, own, prompt, **settings, rule="sample-and-match")


def fast(target, drafter, rows, new, sampling=GREEDY, ends=None, recorder=None, prompts=PROMPTS):
    length = max(map(len, prompts)) + new  # not a place more than the longest response needs
    decoder = StaticDecoder(
        target, drafter, rows=rows, length=length, sampling=sampling, recorder=recorder
    )
    sources = [keyed_source(3, place) for place in range(len(prompts))]
    return decoder.decode(prompts, max_new_tokens=new, eos_token_ids=ends, sources=sources)


def assert_same(found, expected):
    assert found.ids == expected.ids
    assert found.rounds == expected.rounds
    assert found.drafts == expected.drafts
    assert found.finished == expected.finished


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_every_token_round_and_draft_is_the_loops(pair, rows, sampling):
    target, drafter = pair
    expected = [
        slow(target, drafter, prompt, i, 40, sampling, ends=()) for i, prompt in enumerate(PROMPTS)
    ]
    found = fast(target, drafter, rows, 40, sampling, ends=())
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    lengths = {tuple(one.round_lengths) for one in expected}
    assert len(lengths) > 1  # rows go at different speeds
    assert max(max(one) for one in lengths) > 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@torch.no_grad()
def test_what_is_recorded_depends_on_nothing_that_the_host_knew(pair, sampling):
    target, drafter = pair
    for one in (drafter, None):
        expected = fast(target, one, 2, 30, sampling)
        for ours, theirs in zip(
            fast(target, one, 2, 30, sampling, recorder=Tape()), expected, strict=True
        ):
            assert_same(ours, theirs)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@torch.no_grad()
def test_the_target_alone_is_the_plain_loop(pair, sampling):
    target, _ = pair
    for place, ours in enumerate(fast(target, None, 2, 25, sampling, ends=())):
        assert_same(ours, slow(target, None, PROMPTS[place], place, 25, sampling, ends=()))


@pytest.mark.parametrize("new", [1, 2, 5])
@torch.no_grad()
def test_limits_and_ends_of_a_response(pair, new):
    target, drafter = pair
    whole = slow(target, drafter, PROMPTS[0], 0, 30, ends=())
    for end in {whole.ids[0], whole.ids[3], whole.ids[9]}:
        for place, ours in enumerate(fast(target, drafter, 2, new, ends=(end,))):
            assert_same(ours, slow(target, drafter, PROMPTS[place], place, new, ends=(end,)))


@torch.no_grad()
def test_a_decoder_serves_one_call_after_another(pair):
    target, drafter = pair
    decoder = StaticDecoder(target, drafter, rows=2, length=80, recorder=Tape())
    for prompts in (PROMPTS[:1], PROMPTS[1:], PROMPTS[:3]):
        for prompt, ours in zip(
            prompts, decoder.decode(prompts, max_new_tokens=20, eos_token_ids=()), strict=True
        ):
            assert_same(ours, slow(target, drafter, prompt, 0, 20, ends=()))


@torch.no_grad()
def test_windows_slide_over_a_long_row():
    target = in_memory("gemma3")
    prompt = [i * 7 % 200 for i in range(3 * SLIDING_WINDOW)]
    decoder = StaticDecoder(target, None, length=len(prompt) + 30)
    (ours,) = decoder.decode([prompt], max_new_tokens=30, eos_token_ids=())
    assert ours.ids == slow(target, None, prompt, 0, 30, ends=()).ids


@torch.no_grad()
def test_a_call_that_was_interrupted_leaves_nothing_going(pair, monkeypatch):
    target, drafter = pair
    decoder = StaticDecoder(target, drafter, rows=2, length=80)
    launch, launched = StaticDecoder._launch, []

    def stop(self, jobs):
        launched.append(jobs)
        if len(launched) == 3:
            raise KeyboardInterrupt
        return launch(self, jobs)

    monkeypatch.setattr(StaticDecoder, "_launch", stop)
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(PROMPTS[:2], max_new_tokens=60, eos_token_ids=())
    monkeypatch.undo()
    (ours,) = decoder.decode(PROMPTS[2:3], max_new_tokens=60, eos_token_ids=())
    assert_same(ours, slow(target, drafter, PROMPTS[2], 2, 60, ends=()))
    assert not decoder._going_B[1]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_may_be_very_short(family, length):
    target = in_memory(family)
    StaticTarget(target, length=length)
    decoder = StaticDecoder(target, None, length=length)
    if length > 1:
        assert len(decoder.decode([[5]], max_new_tokens=1)[0].ids) == 1


def test_a_window_that_the_config_does_not_name_is_refused(monkeypatch):
    target = in_memory("llama")
    masks = AttentionMasks.of

    def windowed(self, seen, distance):
        return masks(self, seen & (distance < 100), distance)

    monkeypatch.setattr(AttentionMasks, "of", windowed)
    with pytest.raises(UserError, match="not give the same states with a cache of fixed size"):
        StaticTarget(target, length=300)


def test_rope_that_asks_the_host_is_refused():
    target = in_memory("llama")
    drafter = overfitted_drafter(target, [EvalPrompt("s", 0, PROMPTS[0])], steps=1)
    drafter.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="drafter's rope is of type dynamic"):
        StaticDecoder(target, drafter, length=20)
    by_layer = in_memory("gemma3")
    rope = by_layer.config.rope_parameters
    rope["full_attention"] = rope["full_attention"] | {"rope_type": "longrope"}
    with pytest.raises(UserError, match="its rope is of type longrope"):
        StaticTarget(by_layer, length=20)


def test_what_does_not_fit_or_go_is_one_sentence():
    target = in_memory("llama")
    decoder = StaticDecoder(target, None, length=20)
    with pytest.raises(UserError, match="exceed the decoder's length of 20"):
        decoder.decode([[1] * 11], max_new_tokens=10)
    assert len(decoder.decode([[1] * 10], max_new_tokens=10, eos_token_ids=())[0].ids) == 10
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        decoder.decode([[1], []], max_new_tokens=10)
    warm = StaticDecoder(target, None, length=20, sampling=WARM)
    with pytest.raises(UserError, match="a source of random numbers"):
        warm.decode([[1]], max_new_tokens=2)
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="load it with sdpa"):
        StaticTarget(target, length=20)


def test_a_target_that_reads_masks_in_another_way_is_refused(monkeypatch):
    target = in_memory("llama")
    monkeypatch.setattr(AttentionMasks, "of", lambda self, seen, distance: None)
    with pytest.raises(UserError, match="not give the same states with a cache of fixed size"):
        StaticTarget(target, length=40)


@torch.no_grad()
def test_eager_attention_takes_the_mask_too():
    target = in_memory("llama")
    expected = slow(target, None, PROMPTS[1], 0, 20, ends=()).ids
    target.model.set_attn_implementation("eager")
    (ours,) = fast(target, None, 1, 20, ends=(), prompts=PROMPTS[1:2])
    assert ours.ids == expected
