"""Guards recorded trees and cut drafts: token by token and round by round they are the loops'.

Slow twins: `decode_with_search`, and `decode_speculatively` with a draft length; `decode_plainly`.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.draft_length import DraftLength
from drafter.errors import UserError
from drafter.evaluation.measure import keyed_source
from drafter.evaluation.trajectories import EvalPrompt
from drafter.sampling import GREEDY, Sampling
from drafter.search import ROOT, Search, TokenTree, merged
from drafter.static_search import StaticSearchDecoder, ancestors
from drafter.static_target import StaticTarget
from drafter.target import Target
from drafter.target_loading import Loaded
from drafter.target_masks import AttentionMasks
from drafter.tree_decoding import CachedTreeTarget, decode_with_search
from tests.test_step_graphs import Tape
from tests.tiny import SLIDING_WINDOW, tiny_config, tiny_model, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

PLANS = [
    Search("tree", budget=30),
    Search("self-select", drafts=4),
    DraftLength(0.5, (0.3, 1.0), (0.2, 0.9)),
]
SMALL = [Search("tree", budget=1), Search("self-select", drafts=1), DraftLength(0.4)]
WARM = Sampling(1.0)
NEW, SEED = 18, 5
PROMPTS = [[7, 9, 6], [12, 8, 5, 30, 21], list(range(5, 25)), [100, 4]]

PLACES = range(len(PROMPTS))


@pytest.fixture(scope="module", params=["llama", "gemma3"])  # gemma3's windows slide
def pair(request):
    assert max(map(len, PROMPTS)) > SLIDING_WINDOW
    target = Target(Loaded(tiny_model(tiny_config(request.param)), tiny_tokenizer()), "tiny", None)
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS[:3])]
    return target, overfitted_drafter(target, prompts, block_size=5, new_tokens=NEW, steps=25)


def slow(pair, plan, place, new=NEW, sampling=GREEDY, ends=()):
    target, drafter = pair
    settings = {
        "max_new_tokens": new,
        "eos_token_ids": ends,
        "sampling": sampling,
        "source": keyed_source(3, place),
    }
    if plan is None:
        return decode_plainly(CachedTarget(target), PROMPTS[place], **settings)
    engine = CachedTreeTarget(target, drafter.config.target_layer_ids)
    if isinstance(plan, Search):
        own = CachedDrafter(drafter, target, engine)
        settings |= {"search": plan, "seed": SEED, "key": place}
        return decode_with_search(engine, own, PROMPTS[place], **settings)
    own = CachedDrafter(drafter, target, engine, plan)
    return decode_speculatively(engine, own, PROMPTS[place], **settings, rule="sample-and-match")


def decoder_for(pair, plan, new=NEW, **settings):
    longest = max(map(len, PROMPTS))  # not a place more than the longest response needs
    return StaticSearchDecoder(*pair, plan, length=longest + new, **settings)


def fast(decoder, new=NEW, ends=(), places=PLACES):
    return decoder.decode(
        [PROMPTS[place] for place in places],
        max_new_tokens=new,
        eos_token_ids=ends,
        sources=[keyed_source(3, place) for place in places],
        seed=SEED,
        keys=list(places),
    )


def assert_same(found, expected):
    assert found.ids == expected.ids
    assert found.rounds == expected.rounds
    assert found.drafts == expected.drafts
    assert found.trees == expected.trees
    assert found.finished == expected.finished


@pytest.mark.parametrize(
    ("plan", "sampling"),
    [*itertools.product(PLANS, [GREEDY, WARM]), *((plan, GREEDY) for plan in SMALL)],
    ids=lambda one: getattr(one, "label", "greedy" if one == GREEDY else "warm"),
)
@torch.no_grad()
def test_every_token_round_and_tree_is_the_loops(pair, plan, sampling):
    found = fast(decoder_for(pair, plan, sampling=sampling))
    for place, ours in enumerate(found):
        assert_same(ours, slow(pair, plan, place, sampling=sampling))
        if plan in PLANS:
            assert ours.ids == slow(pair, None, place, sampling=sampling).ids
    if sampling.greedy:
        assert max(max(one.round_lengths) for one in found) > 1
    if isinstance(plan, DraftLength):
        assert len({len(draft) for one in found for draft in one.drafts}) > 1


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.label)
@torch.no_grad()
def test_what_is_recorded_depends_on_nothing_that_the_host_knew(pair, plan):
    expected = [slow(pair, plan, place, 12, WARM) for place in (1, 2)]
    recorded = decoder_for(pair, plan, sampling=WARM, recorder=Tape())
    for _ in range(2):
        for ours, theirs in zip(fast(recorded, 12, places=(1, 2)), expected, strict=True):
            assert_same(ours, theirs)
        recorded.stand_at(10)  # as for timing: nothing is left of it
        recorded.draft()
        recorded.verify(recorded.node_counts[0])


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.label)
@torch.no_grad()
def test_an_end_inside_a_tree_and_the_limit_of_a_response(pair, plan):
    decoder = decoder_for(pair, plan)
    inside = set()  # tokens that were accepted, and behind which a round went on
    for place in range(len(PROMPTS)):
        whole, at = slow(pair, plan, place), 1
        for round_ in whole.rounds:
            inside |= {
                (place, token)
                for n, token in enumerate(round_.tokens[:-1], at)
                if whole.ids.index(token) == n
            }
            at += round_.length
    assert inside
    for place, end in sorted(inside)[:5]:
        (ours,) = fast(decoder, ends=(end,), places=[place])
        assert_same(ours, slow(pair, plan, place, ends=(end,)))
        assert ours.ids[-1] == end
    (ours,) = fast(decoder, ends=(whole.ids[0],), places=[len(PROMPTS) - 1])
    assert (ours.ids, ours.rounds, ours.finished) == (whole.ids[:1], [], True)
    for new in (1, 2, 3, 5):
        for place, ours in enumerate(fast(decoder, new)):
            assert_same(ours, slow(pair, plan, place, new))
            assert len(ours.ids) == new


def test_rows_see_themselves_and_their_ancestors():
    tree = merged([[1, 2, 3, 4, 5], [1, 2, 9, 4], [7, 7, 7], [1, 2, 9, 8, 8, 8, 8]])
    count = 1 + len(tree.tokens)
    expected = torch.eye(count + 3, dtype=torch.bool)  # and three of padding
    for row, parent in enumerate(tree.parents, 1):
        expected[row] |= expected[parent - ROOT]
    parents = [0, *(parent - ROOT for parent in tree.parents), *range(count, count + 3)]
    assert max(tree.depths) == 7
    assert torch.equal(ancestors(torch.tensor(parents), 7), expected)
    assert not torch.equal(ancestors(torch.tensor(parents), 4), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_path_that_is_moved_is_what_a_straight_pass_would_have_left(family):
    target = Target(Loaded(tiny_model(tiny_config(family)), tiny_tokenizer()), "tiny", None)
    tree = TokenTree([5, 6, 7, 8, 9], [ROOT, ROOT, 0, 2, 0])
    prompt, path = torch.tensor([PROMPTS[2]]), [0, 1, 3, 4]
    start, later = torch.tensor([prompt.shape[1]]), torch.tensor([[20, 21]])
    through, straight = (StaticTarget(target, (0, 2), length=48) for _ in range(2))
    through.join()
    for one in (through, straight):
        one.run(prompt, torch.arange(prompt.shape[1])[None])
    seen = ancestors(torch.tensor([0, *(parent - ROOT for parent in tree.parents)]), 3)
    found = through.run_tree(
        torch.tensor([[11, *tree.tokens]]), start, torch.tensor([[0, *tree.depths]]), seen[None]
    )
    positions = start + torch.arange(4)[None]
    expected = straight.run(torch.tensor([[11, 5, 7, 8]]), positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:, path], theirs, atol=1e-4, rtol=1e-4)
    through.move(start + torch.tensor([path]), positions)
    ours, theirs = (one.run(later, positions[:, -2:] + 2) for one in (through, straight))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_is_infinite_in_bf16_padding_included(pair):
    model = tiny_model(tiny_config()).to(torch.bfloat16)
    target = Target(Loaded(model, tiny_tokenizer()), "tiny", None)
    drafter = copy.deepcopy(pair[1]).to(torch.bfloat16)
    for plan in PLANS:
        decoder = StaticSearchDecoder(target, drafter, plan, length=60)
        decoder.decode(PROMPTS[:2], max_new_tokens=12, eos_token_ids=())
        assert torch.isfinite(decoder._taps).all()
        assert torch.isfinite(decoder._told).all()


def test_what_does_not_fit_or_go_is_one_sentence(pair, monkeypatch):
    decoder = decoder_for(pair, PLANS[0], sampling=WARM)
    with pytest.raises(UserError, match="a source of random numbers"):
        decoder.decode(PROMPTS, max_new_tokens=2)
    with pytest.raises(UserError, match="exceed the decoder's length"):
        fast(decoder, NEW + 1)
    target = Target(Loaded(tiny_model(tiny_config()), tiny_tokenizer()), "tiny", None)
    monkeypatch.setattr(AttentionMasks, "of", lambda self, seen, distance: None)
    with pytest.raises(UserError, match="same states"):
        StaticSearchDecoder(target, pair[1], PLANS[0], length=40)
