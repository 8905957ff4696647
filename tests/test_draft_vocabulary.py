"""Guards A20: a reduced draft vocabulary whose map is lost or misread, or that hides its misses.

Legend: V vocabulary, R kept tokens, K block size.
"""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.test_verification_exact_laws as laws
from data.rows import RowSet
from drafter.blocks import build_blocks
from drafter.config import DrafterConfig
from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.draft_vocabulary import ReducedHead, from_maps, mask_of, most_frequent, offsets
from drafter.errors import UserError
from drafter.evaluation.loading import drafter_fingerprint, load_drafter
from drafter.evaluation.trajectories import EvalPrompt
from drafter.export import main as export
from drafter.graphs import StepGraphs
from drafter.head import FrozenHead, score_blocks
from drafter.model import Drafter
from drafter.module import DrafterModule
from drafter.replay import count_rounds, replay_slots, replay_trees
from drafter.sampling import Sampling
from drafter.search import Search
from drafter.soft_labels import soft_labels
from drafter.static_decoding import StaticDecoder
from drafter.tree_decoding import CachedTreeTarget, decode_with_search
from drafter.whole_scores import TargetStates
from losses import CombinedLoss
from losses.scores import WHOLE_SCORES
from tests.runs import cli, same, scalars, weights
from tests.test_soft_labels import make_batch, make_head
from tests.test_step_graphs import Tape
from tests.tiny import NUM_TOKENS, VOCAB_SIZE, tiny_target
from tests.tiny_drafters import overfitted_drafter

KEPT = torch.tensor([1, 4, 7])
SHORT = {"verification__max_new_tokens": 6, "verification__prompts_per_set": 1}
HEADS = {
    "plain": {},
    "bias": {"bias": True, "scale": 1.7},
    "capped": {"bias": True, "softcap": 2.0},
}


# ------------------------------------------------------------------ maps


def test_draft_ids_are_offsets_in_files_and_token_ids_elsewhere():
    assert offsets(KEPT).tolist() == [1, 3, 5]
    assert mask_of(KEPT, 10).nonzero().flatten().tolist() == [1, 4, 7]
    assert from_maps(offsets(KEPT), mask_of(KEPT, 10), 3, 10, "here").tolist() == [1, 4, 7]
    head = ReducedHead.of(FrozenHead(torch.eye(10)), KEPT)
    logits = head.logits(torch.arange(10.0).flip(0)[None])[0]
    assert logits.isfinite().nonzero().flatten().tolist() == [1, 4, 7]
    assert logits[KEPT].tolist() == [8, 5, 2]
    assert head.draft_ids.tolist() == [-1, 0, -1, -1, 1, -1, -1, 2, -1, -1]


@pytest.mark.parametrize(
    ("d2t", "t2d", "said"),
    [
        ([1, 3], None, "has draft_vocab_size 3"),
        ([1, 4, 7], None, "does not name 3 different tokens of 8"),  # token ids, not offsets
        ([1, 0, 0], None, "does not name 3 different"),
        ([-1, 3, 5], None, "does not name 3 different"),
        ([1.0, 3.0, 5.0], None, "d2t is torch.float32"),
        ([1, 3, 5], [1, 4, 6], "t2d and d2t name different tokens"),
    ],
)
def test_maps_that_contradict_are_refused(d2t, t2d, said):
    t2d = None if t2d is None else mask_of(torch.tensor(t2d), 8)
    with pytest.raises(UserError, match=said):
        from_maps(torch.tensor(d2t), t2d, 3, 8, "here")


def test_the_most_frequent_are_kept_and_equal_ones_by_id():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 50)
    for size in (1, 7, 50):
        ranked = sorted(range(50), key=lambda token: (-counts[token], token))
        assert most_frequent(counts, size).tolist() == sorted(ranked[:size])


# ------------------------------------------------------------------ scores


def scored(head, batch, hidden, target_hidden, fixed_shape, size=4):
    blocks = build_blocks(batch, size, 0)
    whole = head.whole if isinstance(head, ReducedHead) else head
    rows = head.rows if isinstance(head, ReducedHead) else head
    reduced = head if isinstance(head, ReducedHead) else None
    return score_blocks(
        head,
        hidden,
        blocks,
        soft=None if whole.softcap else soft_labels(rows, target_hidden),
        target=TargetStates(target_hidden, 1.0, WHOLE_SCORES, reduced),
        fixed_shape=fixed_shape,
    )


def inputs(seed=0):
    batch = make_batch()
    torch.manual_seed(seed)
    rows, length = batch.input_ids.shape
    shape = (rows, batch.anchors.shape[1], 4, 7)
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return batch, hidden, torch.randn(rows * length, 7, dtype=torch.float64)


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("variant", HEADS)
def test_scores_are_those_of_the_dense_twin(variant, fixed_shape):
    whole = make_head(**HEADS[variant])
    batch, hidden, target_hidden = inputs()
    kept = torch.arange(0, whole.vocab_size, 2)
    found = scored(ReducedHead.of(whole, kept), batch, hidden, target_hidden, fixed_shape)
    blocks = build_blocks(batch, 4, 0)
    log_q = whole.logits(hidden)[..., kept].log_softmax(-1).flatten(0, 1)
    length = batch.input_ids.shape[1]
    upstream = torch.randn(4, *found.valid.shape, dtype=torch.float64)
    expected, ours = [], []
    for m, anchor in enumerate(batch.anchors.flatten().tolist()):
        for k in range(1, 4):
            valid = bool(blocks.valid.flatten(0, 1)[m, k - 1])
            assert found.valid[m, k - 1] == valid
            label = int(blocks.labels.flatten(0, 1)[m, k - 1])
            outside = valid and label % 2 == 1
            assert found.outside[m, k - 1] == outside
            if not valid:
                continue
            q = log_q[m, k]
            row = m // batch.anchors.shape[1]
            logits_p = whole.logits(target_hidden[row * length + anchor + k - 1])
            log_p = logits_p.log_softmax(-1)[kept]  # of all tokens
            again = logits_p[kept].log_softmax(-1)  # renormalised
            place = (m, k - 1)
            if outside:
                assert found.log_prob[place] == -torch.inf
                assert not found.correct[place]
            else:
                expected.append(q[label // 2] * upstream[0][place])
                ours.append(found.log_prob[place] * upstream[0][place])
                assert found.correct[place] == (q.argmax() == label // 2)
            scores = {
                "overlap": torch.minimum(log_p.exp(), q.exp()).sum(),
                "reverse_kl": (q.exp() * (q - log_p)).sum(),
                "kl": (again.exp() * (again - q)).sum(),
            }
            for number, (name, score) in enumerate(scores.items(), 1):
                one = getattr(found, name)
                if one is None:
                    assert variant == "capped"
                    continue
                torch.testing.assert_close(one[place], score)
                expected.append(score * upstream[number][place])
                ours.append(one[place] * upstream[number][place])
    assert found.outside.any()
    assert (found.valid & ~found.outside).any()
    grads = [torch.autograd.grad(sum(own), hidden)[0] for own in (ours, expected)]
    torch.testing.assert_close(*grads)


def test_all_tokens_kept_is_off_to_the_bit():
    whole = make_head(bias=True, scale=1.7, dtype=torch.float32)
    batch, hidden, target_hidden = inputs()
    loss = CombinedLoss(alpha_kl=1.0)
    totals, grads = [], []
    for head in (whole, ReducedHead.of(whole, torch.arange(whole.vocab_size))):
        leaf = hidden.detach().float().requires_grad_()
        out = loss(scored(head, batch, leaf, target_hidden.float(), False), 0.0)
        totals.append(out.total.detach())
        grads.append(torch.autograd.grad(out.total, leaf)[0])
    assert torch.equal(*totals)
    assert torch.equal(*grads)


# ------------------------------------------------------------------ inference


def reduced_law(prefix, slot, sampling):
    """Of tokens 0 and 2: the draft's law over all three, renormalised."""
    full = laws.table("r", prefix, slot)
    rows = [full[0] + Fraction(1, 9), Fraction(0), full[2] + Fraction(1, 9)]
    return laws.warped([x / sum(rows) for x in rows], sampling)


class ReducedTableDrafter(laws.TableDrafter):
    """Whose states are logarithms of weights, which the shipped reduced head turns into logits."""

    def draft(self, anchor_id):
        prefix = (*self.target.committed, anchor_id)
        slots = range(1, self.block_size)
        rows = [[float(x + Fraction(1, 9)) for x in laws.table("r", prefix, k)] for k in slots]
        whole = FrozenHead(torch.eye(3, dtype=torch.float64))
        head = ReducedHead.of(whole, torch.tensor([0, 2]))
        return head.logits(torch.tensor(rows, dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("rule", "sampling"),
    [
        ("rejection", laws.WARPS[0]),
        ("rejection", laws.WARPS[3]),
        ("rejection-argmax", laws.WARPS[3]),
        ("sample-and-match", laws.WARPS[0]),
    ],
    ids=str,
)
def test_text_has_the_targets_law_though_a_token_is_never_drafted(rule, sampling, monkeypatch):
    runs = laws.enumerate_loop(3, 4, rule, sampling, ReducedTableDrafter)
    laws.assert_same_law(laws.text_law(runs), laws.exact_texts(4, sampling))
    assert any(1 in decoded.ids[1:] for _, decoded in runs)
    assert all(token != 1 for _, decoded in runs for draft in decoded.drafts for token in draft)
    if rule == "rejection":
        monkeypatch.setattr(sys.modules[laws.__name__], "draft_law", reduced_law)
        exact = laws.exact_rounds(3, 4, sampling)
        laws.assert_same_law(laws.joint_law(runs), exact)
        thinned = laws.defaultdict(Fraction)  # replay's rule, min(1, q/p), with q(1) = 0
        for text, p in laws.exact_texts(4, sampling).items():
            for weight, counts in laws.thinned(text, 3, sampling):
                thinned[text, counts.round_lengths] += p * weight
        assert thinned == exact


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A target, and a drafter that may not draft a third of what the target writes."""
    target = tiny_target(tmp_path_factory.mktemp("target"))
    torch.manual_seed(0)
    ids = torch.randint(5, NUM_TOKENS, (3, 6)).tolist()
    prompts = [EvalPrompt("s", i, one) for i, one in enumerate(ids)]
    drafter = overfitted_drafter(target, prompts, steps=30)
    texts = [response.ids for response in target.generate(ids, 24)]
    written = sorted({token for text in texts for token in text})
    kept = torch.tensor([token for i, token in enumerate(written) if i % 3])
    drafter.reserve_vocabulary(len(kept))
    drafter.choose_vocabulary(kept)
    return target, drafter, ids, texts, set(kept.tolist())


def loop(target, drafter, ids, **settings):
    engine = CachedTarget(target, drafter.config.target_layer_ids)
    return decode_speculatively(
        engine,
        CachedDrafter(drafter, target, engine),
        ids,
        max_new_tokens=24,
        eos_token_ids=target.eos_token_ids,
        **settings,
    )


@torch.no_grad()
def test_greedy_text_is_the_targets_and_replay_static_and_tree_agree(setup):
    target, drafter, prompts, texts, kept = setup
    layer_ids = drafter.config.target_layer_ids
    static = StaticDecoder(target, drafter, rows=2, length=40)
    together = static.decode(prompts, max_new_tokens=24)
    search = Search("tree", budget=6)
    accepted = 0
    for ids, text, fixed in zip(prompts, texts, together, strict=True):
        decoded = loop(target, drafter, ids)
        assert decoded.ids == fixed.ids == text
        assert fixed.round_lengths == decoded.round_lengths
        drafted = {token for draft in decoded.drafts for token in draft}
        assert drafted <= kept
        accepted += sum(round_.accepted for round_ in decoded.rounds)
        row = torch.tensor([*ids, *text])
        states = target.features(row[None], torch.zeros_like(row)[None], layer_ids).hidden_states
        given = (drafter, target.embed, target.head, states, row, len(ids))
        slots = replay_slots(*given, sampling=Sampling(0.0))
        assert list(count_rounds(slots).round_lengths) == decoded.round_lengths
        tree_engine = CachedTreeTarget(target, layer_ids)
        by_tree = decode_with_search(
            tree_engine,
            CachedDrafter(drafter, target, tree_engine),
            ids,
            search=search,
            max_new_tokens=24,
            eos_token_ids=target.eos_token_ids,
        )
        assert by_tree.ids == text
        trees = replay_trees(*given, search=search, seed=0, key=0)
        assert list(count_rounds(trees).round_lengths) == by_tree.round_lengths
    assert accepted > 0
    assert {token for text in texts for token in text} - kept


@torch.no_grad()
def test_replay_accepts_a_token_outside_with_probability_zero(setup):
    target, drafter, prompts, texts, kept = setup
    row = torch.tensor([*prompts[0], *texts[0]])
    states = target.features(
        row[None], torch.zeros_like(row)[None], drafter.config.target_layer_ids
    ).hidden_states
    log_probs = torch.full((len(texts[0]),), -1.0)
    slots = replay_slots(
        drafter,
        target.embed,
        target.head,
        states,
        row,
        len(prompts[0]),
        sampling=Sampling(1.0),
        log_probs=log_probs,
    )
    for anchor, valid in enumerate(slots.valid):
        for slot in np.flatnonzero(valid):
            if texts[0][anchor + 1 + slot] not in kept:
                assert slots.accept[anchor, slot] == 0
    assert (slots.accept > 0).any()


@torch.no_grad()
def test_the_plain_target_and_another_head_are_left_as_they_are(setup):
    target, drafter, prompts, texts, _ = setup
    engine = CachedTarget(target)
    plain = decode_plainly(
        engine, prompts[0], max_new_tokens=24, eos_token_ids=target.eos_token_ids
    )
    assert plain.ids == texts[0]
    first = drafter.head(target.head)
    assert drafter.head(target.head) is first  # rows are copied once
    other = FrozenHead(target.head.weight + 1)
    assert drafter.head(other).whole is other


# ------------------------------------------------------------------ runs and files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {**SHORT, "model__loss": {"alpha_kl": 0.5}, "data__keep_in_memory": True}
    return folder, cli(folder, model__draft_vocab_size=20, trainer__max_epochs=1, **settings)


def last(folder):
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_a_run_keeps_the_most_frequent_and_says_what_it_misses(run):
    folder, made = run
    counts = np.zeros(VOCAB_SIZE, dtype=int)
    for row in made.datamodule.train_rows:
        for token, supervised in zip(row.input_ids, row.supervised, strict=True):
            counts[token] += supervised
    ranked = sorted(range(VOCAB_SIZE), key=lambda token: (-counts[token], token))[:20]
    kept = weights(last(folder))["drafter.draft_tokens"]
    assert kept.tolist() == sorted(ranked)
    logged = scalars(folder / "run")
    missed = [value for _, value in logged["train/outside_draft_vocabulary"]]
    assert all(0 < value < 1 for value in missed)
    assert all(np.isfinite(value) for _, value in logged["train/loss"])
    assert "val/outside_draft_vocabulary" in logged


def test_it_goes_on_without_counting_again(run, monkeypatch, capsys):
    folder, _ = run
    before = weights(last(folder))
    monkeypatch.setattr(RowSet, "supervised_counts", None)
    told = ("--ckpt_path", str(last(folder)))
    more = cli(folder, extra=told, trainer__max_epochs=2, model__draft_vocab_size=20, **SHORT)
    after = weights(more)
    assert torch.equal(before["drafter.draft_tokens"], after["drafter.draft_tokens"])
    assert not same(before, after)
    with pytest.raises(SystemExit):
        cli(folder, extra=told, trainer__max_epochs=3, **SHORT)
    assert "draft_vocab_size: 20 -> None" in capsys.readouterr().err


def test_all_tokens_kept_trains_to_the_same_weights(tmp_path):
    off, on = (
        weights(cli(tmp_path, trainer__max_steps=4, model__draft_vocab_size=size, **SHORT))
        for size in (None, VOCAB_SIZE)
    )
    assert on.pop("drafter.draft_tokens").tolist() == list(range(VOCAB_SIZE))
    assert same(off, on)


def test_a_drafters_weights_are_the_same_for_any_vocabulary(setup, run):
    target, *_ = setup
    module = DrafterModule(block_size=4, draft_vocab_size=9, num_layers=1)
    module.attach(target)
    with pytest.raises(UserError, match="is not known: `fit` counts"):
        _ = module.head
    for size, said in ((0, "is 0, of the target's 256"), (257, "give 1 to 256")):
        with pytest.raises(UserError, match=said):
            DrafterModule(draft_vocab_size=size).attach(target)
    begun = str(run[0] / "run")
    for size in (None, 20):  # it may be left out
        module = DrafterModule(init_from=begun, draft_vocab_size=size)
        module.attach(run[1].datamodule.target)
        assert not module.drafter.lacks_vocabulary
    with pytest.raises(
        UserError, match=r"drafts from 20 tokens, --model\.draft_vocab_size says 30"
    ):
        DrafterModule(init_from=begun, draft_vocab_size=30).attach(run[1].datamodule.target)


def test_an_export_says_which_tokens_and_carries_their_rows(run, capsys):
    folder, made = run
    with pytest.raises(SystemExit):
        export([str(folder / "run"), "--output", str(folder / "zlab")])
    assert "export it with --format speculators" in capsys.readouterr().err
    out = folder / "speculators"
    export([str(folder / "run"), "--output", str(out), *("--format", "speculators")])
    export(["check", str(out)])
    assert ": 0 of" in capsys.readouterr().out
    kept = weights(last(folder))["drafter.draft_tokens"]
    tensors = load_file(out / "model.safetensors")
    assert (tensors["d2t"] + torch.arange(20)).equal(kept)
    assert tensors["t2d"].nonzero().flatten().equal(kept)
    head = made.datamodule.target.head
    assert tensors["lm_head.weight"].equal(head.weight[kept].bfloat16())
    again = load_drafter(str(out))
    assert again.drafter.draft_tokens.equal(kept)
    begun = {"model__init_from": str(out), "run_dir": str(folder / "of-export")}
    begun = weights(cli(folder, trainer__max_steps=1, **SHORT, **begun))
    assert begun["drafter.draft_tokens"].equal(kept)
    # another head than the target's rows is refused, as one of the whole vocabulary is
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight is not the head"):
        load_drafter(str(out))


def test_what_is_off_leaves_no_trace():
    config = DrafterConfig(dflash_config={"mask_token_id": 1, "target_layer_ids": [0]})
    assert "draft_vocab_size" not in config.to_dict()
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = DrafterConfig.from_dict(config.to_dict() | small)
    drafter = Drafter(config)
    assert "draft_tokens" not in drafter.state_dict()
    head = FrozenHead(torch.eye(9))
    assert drafter.head(head) is head
    prints = {drafter_fingerprint(drafter)}
    for kept in ([1, 4], [1, 5]):
        drafter.reserve_vocabulary(2)
        with pytest.raises(UserError, match="is not known"):
            drafter.head(head)
        drafter.choose_vocabulary(torch.tensor(kept))
        prints.add(drafter_fingerprint(drafter))
    assert len(prints) == 3


def test_a_recorded_step_replays_what_is_outside(run):
    _, made = run
    module = made.model
    loader = made.datamodule.train_dataloader()
    batch = made.datamodule.add_features(next(iter(loader)), *module.feature_request())

    def forward(one):
        return module(one, fixed_shape=True)

    trained = [p for p in module.parameters() if p.requires_grad]
    graphs = StepGraphs(forward, trained, Tape())
    plain = forward(batch)
    for _ in range(3):
        found = graphs(batch)
    assert len(graphs) == 1
    for name in ("log_prob", "correct", "valid", "outside"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    expected = torch.autograd.grad(module.loss(plain, 0.0).total, trained)
    for own, other in zip(
        torch.autograd.grad(module.loss(found, 0.0).total, trained), expected, strict=True
    ):
        torch.testing.assert_close(own, other)
