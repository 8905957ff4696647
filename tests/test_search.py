"""Trees of drafts: which are grown, that they change no text, and that replay counts their rounds.

The slow twins: all sequences sorted; a target that runs every path of a tree alone.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from drafter.decoding import CachedDrafter, decode_plainly
from drafter.draft_vocabulary import ReducedHead
from drafter.errors import UserError
from drafter.evaluation.measure import STREAM_DECODE, decode_prompt, replay_trajectory
from drafter.evaluation.trajectories import EvalPrompt, Trajectory, TrajectorySettings
from drafter.head import FrozenHead
from drafter.sampling import (
    GREEDY,
    STREAM_SEARCH,
    STREAM_TARGET,
    STREAM_THINNING,
    GeneratorSource,
    Sampling,
)
from drafter.search import ROOT, Search, TokenTree, best_first, grow, merged
from drafter.target_masks import AttentionMasks
from drafter.tree_decoding import CachedTreeTarget, decode_with_search
from tests.test_verification_exact_laws import (
    EOS,
    PLAIN,
    TableDrafter,
    TableTarget,
    assert_same_law,
    every_branch,
    exact_texts,
    logits,
    table,
    text_law,
)
from tests.tiny import SLIDING_WINDOW, tiny_target
from tests.tiny_drafters import overfitted_drafter

SEARCHES = [Search("tree", budget=1), Search("tree", budget=7), Search("self-select", drafts=3)]
FAMILIES = ("llama", "gemma3")  # with and without sliding windows
NEW = 24
PROMPTS = [[7, 9, 6], [12, 8, 5, 30, 21], list(range(5, 25))]


def marginals(generator, slots=4, vocabulary=5):
    return torch.randn(slots, vocabulary, generator=generator).double().log_softmax(-1)


def beginnings(tree):
    """Every place of a tree as the tokens that lead there."""
    found = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*found[parent], token) if parent != ROOT else (token,))
    return found


@pytest.mark.parametrize("budget", [1, 2, 13, 60, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_the_most_probable_beginnings_are_taken_in_order(seed, budget):
    log_probs = marginals(torch.Generator().manual_seed(seed))
    slots, vocabulary = log_probs.shape
    scored = {
        tokens: sum(float(log_probs[k, token]) for k, token in enumerate(tokens))
        for depth in range(1, slots + 1)
        for tokens in itertools.product(range(vocabulary), repeat=depth)
    }
    wanted = sorted(scored, key=lambda tokens: -scored[tokens])[:budget]
    top = log_probs.topk(min(budget, vocabulary))
    tree = best_first(top.values.tolist(), top.indices.tolist(), budget)
    assert beginnings(tree) == wanted
    (grown,) = grow(Search("tree", budget=budget), log_probs[None], torch.zeros(1, 0, slots))
    assert grown == tree


def test_merged_drafts_are_the_drafts():
    drafts = [[1, 2, 3], [1, 2, 4], [2, 2, 3], [1, 2, 3]]
    tree = merged(drafts)
    assert len(tree.tokens) == 7
    for draft in drafts:
        path = tree.follow(draft)
        assert [tree.tokens[place] for place in path] == draft
        assert [tree.depths[place] for place in path] == [1, 2, 3]
    assert tree.follow([1, 9]) == [0]


def test_several_drafts_hold_the_argmax_one_and_follow_the_marginals():
    log_probs = marginals(torch.Generator().manual_seed(0), slots=2, vocabulary=3)
    search, count = Search("self-select", drafts=2), 4000
    uniforms = search.uniforms(3, 5, 0, count, 2)
    assert uniforms.shape == (count, 1, 2)
    trees = grow(search, log_probs.expand(count, -1, -1), uniforms)
    best = log_probs.argmax(-1).tolist()
    assert all(len(tree.follow(best)) == 2 for tree in trees)
    drawn = defaultdict(float)
    for tree in trees:
        others = [b for b in beginnings(tree) if len(b) == 2 and list(b) != best]
        drawn[others[0] if others else tuple(best)] += 1 / count
    for tokens in itertools.product(range(3), repeat=2):
        expected = math.exp(sum(float(log_probs[k, t]) for k, t in enumerate(tokens)))
        assert abs(drawn[tokens] - expected) < 4 * math.sqrt(expected / count)


def test_equal_marginals_are_taken_lowest_id_first():
    (tree,) = grow(Search("tree", budget=3), torch.zeros(1, 2, 3), torch.zeros(1, 0, 2))
    assert beginnings(tree) == [(0,), (1,), (2,)]
    logits = torch.zeros(1, 1, 1000)
    logits[0, 0, [7, 400]] = 3.0
    (tree,) = grow(Search("tree", budget=2), logits, torch.zeros(1, 0, 1))
    assert tree.tokens == [7, 400]


def test_no_token_outside_a_reduced_vocabulary_is_taken_whatever_the_budget():
    for kept, sequences in ((torch.tensor([4]), 1), (torch.tensor([1, 4]), 2)):
        head = ReducedHead.of(FrozenHead(torch.randn(10, 3)), kept)
        logits = head.logits(torch.randn(1, 3, 3))
        (tree,) = grow(Search("tree", budget=60), logits, torch.zeros(1, 0, 3))
        assert set(tree.tokens) == set(kept.tolist())
        assert len(set(beginnings(tree))) == len(tree.tokens)
        assert len(tree.tokens) == sum(sequences**depth for depth in (1, 2, 3))


def test_streams_of_random_numbers_are_apart():
    assert len({STREAM_TARGET, STREAM_THINNING, STREAM_DECODE, STREAM_SEARCH}) == 4


def test_drafts_that_are_drawn_depend_on_seed_prompt_and_place_alone():
    search = Search("self-select", drafts=3)
    whole = search.uniforms(1, 2, 0, 6, 5)
    assert torch.equal(search.uniforms(1, 2, 4, 1, 5), whole[4:5])
    assert not torch.equal(search.uniforms(1, 3, 0, 6, 5), whole)
    assert not torch.equal(search.uniforms(2, 2, 0, 6, 5), whole)
    assert search.uniforms(1, 2, 0, 6, 5).unique().numel() == whole.numel()


# ---------------------------------------------------------------------- exact laws


class TableTreeTarget(TableTarget):
    """Runs every path of a tree by itself."""

    def verify_tree(self, anchor_id, tree):
        self.block = (anchor_id,)
        self.paths = [(), *beginnings(tree)]
        return logits([table("p", (*self.committed, anchor_id, *path)) for path in self.paths])

    def commit_path(self, path):
        self.committed += (self.block[0], *(self.paths[path[-1] + 1] if path else ()))


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.label)
@pytest.mark.parametrize("max_new_tokens", [3, 4])
@pytest.mark.parametrize("block_size", [2, 4])
def test_text_has_the_targets_law_whatever_tree_is_verified(block_size, max_new_tokens, search):
    def run(source):
        target = TableTreeTarget()
        return decode_with_search(
            target,
            TableDrafter(target, block_size),
            [0],
            search=search,
            max_new_tokens=max_new_tokens,
            eos_token_ids=(EOS,),
            sampling=PLAIN,
            source=source,
        )

    runs = list(every_branch(run))
    assert_same_law(text_law(runs), exact_texts(max_new_tokens, PLAIN))
    if max_new_tokens == 4 and block_size == 4 and search.budget > 1:
        assert any(round_.accepted > 0 for _, decoded in runs for round_ in decoded.rounds)


# ---------------------------------------------------------------------- real engines


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, tmp_path_factory):
    target = tiny_target(tmp_path_factory.mktemp(request.param), request.param)
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)]
    assert max(map(len, PROMPTS)) + NEW > SLIDING_WINDOW
    return target, overfitted_drafter(target, prompts, block_size=5, new_tokens=NEW, steps=25)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.label)
def test_the_text_is_the_targets_own_and_replay_counts_the_same_rounds(setup, search, sampling):
    target, drafter = setup
    settings = TrajectorySettings(NEW, sampling, seed=4)
    lengths = []
    for place, prompt_ids in enumerate(PROMPTS):
        prompt = EvalPrompt("s", place, prompt_ids)
        found = decode_prompt(drafter, target, prompt_ids, settings, key=prompt.key, search=search)
        if sampling.greedy:
            (alone,) = target.generate([prompt_ids], NEW)
            assert found.ids == alone.ids
        trajectory = Trajectory(prompt, found.ids, [], found.finished)
        row = torch.tensor([[*prompt_ids, *found.ids]])
        states = target.features(row, torch.zeros_like(row), drafter.config.target_layer_ids)
        replayed = replay_trajectory(
            drafter, target, trajectory, settings, states.hidden_states, search=search
        )
        assert list(replayed.counts.round_lengths) == found.round_lengths
        assert list(replayed.counts.round_accepted) == [r.accepted for r in found.rounds]
        lengths += found.round_lengths
    if search.budget > 1 and sampling.greedy:
        assert max(lengths) > 2


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.label)
def test_sampled_text_is_that_of_the_target_alone_with_the_same_numbers(setup, search):
    target, drafter = setup
    sampling = Sampling(0.9)
    for seed, prompt_ids in enumerate(PROMPTS):
        source = GeneratorSource(torch.Generator().manual_seed(seed))
        engine = CachedTreeTarget(target, drafter.config.target_layer_ids)
        options = {"max_new_tokens": NEW, "eos_token_ids": (), "sampling": sampling}
        found = decode_with_search(
            engine,
            CachedDrafter(drafter, target, engine),
            prompt_ids,
            search=search,
            source=source,
            **options,
        )
        source = GeneratorSource(torch.Generator().manual_seed(seed))
        plain = decode_plainly(CachedTreeTarget(target), prompt_ids, source=source, **options)
        assert found.ids == plain.ids
        assert engine.committed == [*prompt_ids, *found.ids[:-1]]


def test_a_path_that_the_limit_cuts_leaves_nothing_behind_in_the_cache(setup):
    target, drafter = setup
    cut = 0
    for limit in range(2, 14):
        engine = CachedTreeTarget(target, drafter.config.target_layer_ids)
        found = decode_with_search(
            engine,
            CachedDrafter(drafter, target, engine),
            PROMPTS[1],
            search=Search("tree", budget=40),
            max_new_tokens=limit,
            eos_token_ids=(),
        )
        assert len(found.ids) == limit
        assert engine.committed == [*PROMPTS[1], *found.ids[:-1]]
        assert engine.session.length == len(engine.committed)
        last = found.rounds[-1]
        cut += last.accepted == last.length
    assert cut > 0  # a round that ends with an accepted token


def test_a_tree_and_its_cache_are_those_of_its_paths(setup):
    target, drafter = setup
    layer_ids = drafter.config.target_layer_ids
    tree = TokenTree([5, 6, 7, 8, 9], [ROOT, ROOT, 0, 2, 0])
    prompt, anchor = PROMPTS[2], 11
    engine = CachedTreeTarget(target, layer_ids)
    engine.prefill(prompt)
    engine.take_features()
    found = engine.verify_tree(anchor, tree)
    for place, path in enumerate([(), *beginnings(tree)]):
        alone = CachedTreeTarget(target, layer_ids)
        alone.prefill(prompt)
        expected = alone.verify([anchor, *path])
        torch.testing.assert_close(found[place], expected[-1], atol=1e-4, rtol=1e-4)
    engine.commit_path([0, 2, 3])
    assert engine.committed == [*prompt, anchor, 5, 7, 8]
    straight = CachedTreeTarget(target, layer_ids)
    straight.prefill(prompt)
    straight.take_features()
    straight.verify([anchor, 5, 7, 8])
    straight.commit(4)
    torch.testing.assert_close(
        engine.take_features(), straight.take_features(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        engine.verify([20, 21]), straight.verify([20, 21]), atol=1e-4, rtol=1e-4
    )


def test_a_larger_tree_makes_fewer_rounds(setup):
    target, drafter = setup
    settings = TrajectorySettings(NEW)
    rounds = {
        budget: sum(
            len(decode_prompt(drafter, target, ids, settings, search=Search("tree", budget)).rounds)
            for ids in PROMPTS
        )
        for budget in (1, 64)
    }
    assert rounds[64] < rounds[1]


def test_a_target_that_reads_masks_in_another_way_is_refused(tmp_path, monkeypatch):
    target = tiny_target(tmp_path, "llama")
    monkeypatch.setattr(AttentionMasks, "of", lambda self, seen, distance: None)
    with pytest.raises(UserError, match=r"same states for a tree of drafts.*leave --search out"):
        _ = target.tree_masks
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"can't verify trees of drafts.*load it with sdpa"):
        _ = target.tree_masks


def test_numbers_that_make_no_tree_are_refused():
    with pytest.raises(UserError, match="--budget is 0"):
        Search("tree", budget=0)
    with pytest.raises(UserError, match="--drafts is -1"):
        Search("self-select", drafts=-1)
