"""Guards responses: equal to transformers' own, whatever company a prompt is generated in (B7).

Slow twins: `model.generate` for greedy responses; one prompt at a time without a cache for sampled.
"""

from __future__ import annotations

import pytest
import torch

from drafter.errors import UserError
from drafter.sampling import GREEDY, STREAM_TARGET, Sampling, draw, keyed_uniform, warp
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3"]
NEW = 40  # with prompts of 1 to 30 tokens: before, across and past Gemma's window of 16
SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.9)]


def in_memory(family="llama", tied=False, **overrides):
    model = tiny_model(tiny_config(family, tied, **overrides))
    return Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.fixture(scope="module", params=FAMILIES)
def target(request):
    """Has so many EOS ids that most responses end by one, at different lengths."""
    target = in_memory(request.param)
    target.model.generation_config.eos_token_id = list(range(2, VOCAB_SIZE, 12))
    return target


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    lengths = [9, 30, 1, 17, 4, 23, 12, 2, 28, 16, 7, 15]
    return [torch.randint(0, 200, (n,), generator=generator).tolist() for n in lengths]


def by_transformers(target, prompt, new=NEW):
    ids = torch.tensor([prompt])
    out = target.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=list(target.eos_token_ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def by_hand(target, prompt, sampling, seed, key, new=NEW):
    """One token at a time, the whole text through the model each time."""
    text, log_probs = list(prompt), []
    for position in range(new):
        with torch.no_grad():
            logits = target.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        probs = warp(logits, sampling)
        uniform = torch.tensor(keyed_uniform(seed, key, position, STREAM_TARGET))
        text.append(int(draw(probs, uniform)))
        log_probs.append(float(probs[text[-1]].log()))
        if text[-1] in target.eos_token_ids:
            break
    return text[len(prompt) :], log_probs


def test_greedy_responses_are_those_of_transformers_token_for_token(target, prompts):
    responses = target.generate(prompts, NEW, batch_size=5)
    assert [r.ids for r in responses] == [by_transformers(target, p) for p in prompts]
    assert len({len(r.ids) for r in responses}) > 3, "rows must leave the batch at different times"
    for response in responses:
        ends = [i for i, token in enumerate(response.ids) if token in target.eos_token_ids]
        assert ends == ([len(response.ids) - 1] if response.finished else [])
        assert response.finished or len(response.ids) == NEW
        assert response.log_probs == []


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_that_no_eos_ends_reach_the_limit_exactly(family, prompts):
    target = in_memory(family, tied=True, eos_token_id=None)
    target.tokenizer.eos_token = None
    assert target.eos_token_ids == ()
    responses = target.generate(prompts, 24, batch_size=4)
    assert [r.ids for r in responses] == [by_transformers(target, p, 24) for p in prompts]
    assert all(len(r.ids) == 24 and not r.finished for r in responses)


@pytest.mark.parametrize("sampling", [GREEDY, *SAMPLINGS])
def test_batch_size_order_and_company_change_nothing(target, prompts, sampling):
    keys = list(range(len(prompts)))

    def run(order, batch_size):
        responses = target.generate(
            [prompts[i] for i in order],
            NEW,
            sampling,
            seed=3,
            prompt_ids=[keys[i] for i in order],
            batch_size=batch_size,
        )
        return dict(zip(order, responses, strict=True))

    expected = run(keys, 1)
    for order, batch_size in ((keys, 8), (keys[::-1], 8), (keys[3:7], 32), (keys[::2], 3)):
        for i, response in run(order, batch_size).items():
            assert response.ids == expected[i].ids
            assert response.log_probs == pytest.approx(expected[i].log_probs, abs=1e-4)
            assert response.finished == expected[i].finished


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_responses_and_log_probs_are_those_of_the_uncached_twin(target, prompts, sampling):
    responses = target.generate(prompts[:5], 20, sampling, seed=11, batch_size=3)
    for key, (prompt, response) in enumerate(zip(prompts[:5], responses, strict=True)):
        ids, log_probs = by_hand(target, prompt, sampling, 11, key, 20)
        assert response.ids == ids
        assert response.log_probs == pytest.approx(log_probs, abs=1e-4)


def test_seed_and_prompt_id_each_change_a_sampled_response(target, prompts):
    prompt = prompts[0]
    sampling = Sampling(2.0)

    def run(seed, key):
        return target.generate([prompt], 12, sampling, seed=seed, prompt_ids=[key])[0].ids

    assert run(0, 5) == run(0, 5)
    assert len({tuple(run(seed, key)) for seed, key in ((0, 5), (1, 5), (0, 6))}) == 3


def test_the_same_prompt_twice_gives_independent_samples_and_equal_greedy_ones(target, prompts):
    twice = [prompts[0], prompts[0]]
    first, second = target.generate(twice, 12, Sampling(2.0))
    assert first.ids != second.ids
    first, second = target.generate(twice, 12)
    assert first.ids == second.ids


def test_sampled_first_tokens_follow_the_warped_distribution():
    target = in_memory("llama")
    sampling = Sampling(1.5, top_k=6)
    prompt, count = [5, 80, 17], 4000
    responses = target.generate([prompt] * count, 1, sampling, batch_size=1000)
    drawn = torch.tensor([r.ids[0] for r in responses]).bincount(minlength=VOCAB_SIZE)
    with torch.no_grad():
        probs = warp(target.model(input_ids=torch.tensor([prompt])).logits[0, -1], sampling)
    assert not drawn[probs == 0].any()
    expected = probs[probs > 0] * count
    chi_square = ((drawn[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 25.7  # 1 in 10,000 for 5 degrees of freedom; the draw is fixed by its seed


def test_ties_go_to_the_lowest_id(prompts):
    target = in_memory("llama")
    with torch.no_grad():  # every id has a twin 128 above it
        target.head.weight[128:] = target.head.weight[:128]
    for response in target.generate(prompts, 12):
        assert max(response.ids) < 128


def test_every_eos_id_ends_a_response():
    target = in_memory("qwen3")
    prompt = [10, 20, 30]
    free = target.generate([prompt], 12)[0].ids
    for place in range(12):
        if free[place] in free[:place]:
            continue
        for ids in (free[place], [255, free[place]]):
            target.model.generation_config.eos_token_id = ids
            response = target.generate([prompt], 12)[0]
            assert response.finished
            assert response.ids == free[: place + 1]
    target.model.generation_config.eos_token_id = None
    target.config.eos_token_id = free[1]
    assert target.generate([prompt], 12)[0].ids == free[:2]


def test_works_inside_inference_mode_and_autocast(target, prompts):
    expected = target.generate(prompts, 10, batch_size=5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert target.generate(prompts, 10, batch_size=5) == expected


def test_mistakes_are_named():
    target = in_memory("llama")
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        target.generate([[1], []], 4)
    with pytest.raises(UserError, match=r"Prompt 0.*outside.*256"):
        target.generate([[256]], 4)
    with pytest.raises(UserError, match=r"Prompt 0.*outside.*256"):
        target.generate([[4, -1]], 4)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        target.generate([[1]], 0)
    with pytest.raises(UserError, match="batch_size is 0"):
        target.generate([[1]], 4, batch_size=0)
    with pytest.raises(UserError, match=r"505 tokens and 8 new ones.*512"):
        target.generate([[1], [1] * 505], 8)
    assert len(target.generate([[1] * 504], 8)[0].ids) <= 8
    assert target.generate([], 4) == []


def test_a_bar_with_tokens_per_second_is_shown_when_asked_for(prompts, capsys):
    target = in_memory("llama")
    target.generate(prompts, 4, batch_size=4)
    assert capsys.readouterr().err == ""
    target.generate(prompts, 4, batch_size=4, progress=True)
    bar = capsys.readouterr().err
    assert "12/12" in bar
    assert "tokens/s" in bar
