"""Blocks that show some of their first slots (D2SD): what is shown is neither predicted nor scored.

The slow twin says what a block is slot by slot, from its anchor and the slots that it shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from data.batches import BatchDataset
from data.sampler import DraftLoader, EpochBatches, Item
from drafter.blocks import VisiblePrefix, build_blocks, count_valid
from drafter.draft_vocabulary import ReducedHead
from drafter.errors import UserError
from drafter.head import score_blocks
from drafter.soft_labels import soft_labels
from drafter.whole_scores import TargetStates
from losses import BlockScores, CombinedLoss, Confidence, Overlap, WeightedTerm
from tests.losses_twins import total
from tests.runs import cli
from tests.test_blocks_labels_and_validity import MASK, make_batch, valid_by_definition
from tests.test_head_scoring import dense_log_prob, make_head
from tests.test_sampler_order_and_resume import make_rows
from tests.test_step_graphs import batches, recorded

READ = ("kl", "overlap", "confidence")
KEY = {"seed": 3, "sample_id": 5, "epoch": 1}


def some_batch(seed=0, block_size=6):
    """Packed rows with gaps, and blocks that show any number of slots, also too many."""
    draw = np.random.default_rng(seed)
    rows, anchors, length = 3, 7, 30
    cut = np.sort(draw.integers(1, length, size=(rows, 2)), axis=1)
    documents = [[int(i >= c[0]) + int(i >= c[1]) for i in range(length)] for c in cut]
    supervised = (draw.random((rows, length)) < 0.9).tolist()
    batch = make_batch(supervised, draw.integers(-1, length, (rows, anchors)).tolist(), documents)
    batch.visible = torch.from_numpy(draw.integers(0, block_size, (rows, anchors)))
    return batch


def slots_by_definition(batch, block_size):
    """Returns for each block its input ids and the slots k that it predicts, in order."""
    plain = valid_by_definition(batch, block_size)
    found = []
    for b, a in np.ndindex(*batch.anchors.shape):
        anchor, shown = int(batch.anchors[b, a]), int(batch.visible[b, a])
        valid = [k for k in range(1, block_size) if plain[b, a, k - 1]]
        ids = [int(batch.input_ids[b, anchor]) if anchor >= 0 else MASK]
        for k in range(1, block_size):
            ids.append(int(batch.input_ids[b, anchor + k]) if k in valid and k <= shown else MASK)
        found.append((b, anchor, ids, [k for k in valid if k > shown]))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_a_block_shows_and_predicts_what_the_definition_says(seed):
    batch, block_size = some_batch(seed), 6
    blocks = build_blocks(batch, block_size, MASK)
    parts = [t.flatten(0, 1) for t in (blocks.input_ids, blocks.labels, blocks.valid)]
    twins = slots_by_definition(batch, block_size)
    for ids, labels, valid, (b, anchor, twin_ids, slots) in zip(*parts, twins, strict=True):
        assert ids.tolist() == twin_ids
        assert valid.tolist() == [column < len(slots) for column in range(block_size - 1)]
        wanted = [int(batch.input_ids[b, anchor + k]) for k in slots]
        assert labels.tolist() == wanted + [0] * (block_size - 1 - len(slots))
    assert count_valid(batch, block_size).tolist() == blocks.valid.sum((0, 1)).tolist()
    plain = build_blocks(dataclasses.replace(batch, visible=None), block_size, MASK)
    assert torch.equal(blocks.positions, plain.positions)  # slots stay where they are


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_scores_losses_and_gradients_are_those_of_the_hidden_slots(fixed_shape):
    batch, block_size, head = some_batch(4), 6, make_head(vocab=140)
    rows, anchors = batch.anchors.shape
    length = batch.input_ids.shape[1]
    torch.manual_seed(0)
    hidden = torch.randn(rows, anchors, block_size, 7, dtype=torch.float64, requires_grad=True)
    last = torch.randn(rows * length, 7, dtype=torch.float64)
    blocks = build_blocks(batch, block_size, MASK)
    given = {
        "soft": {"soft": soft_labels(head, last)},
        "target": {"target": TargetStates(last, 1.0, ("overlap",))},
    }
    said = torch.randn(rows, anchors, block_size, dtype=torch.float64)
    found = {
        name: score_blocks(head, hidden, blocks, confidence=said, fixed_shape=fixed_shape, **what)
        for name, what in given.items()
    }
    shape = (rows * anchors, block_size - 1)
    log_prob, correct = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=bool)
    kl, overlap, valid = torch.zeros_like(log_prob), torch.zeros_like(log_prob), correct.clone()
    confidence = torch.zeros_like(log_prob)
    predicted = torch.zeros(rows, anchors, block_size, dtype=torch.bool)
    for m, (b, anchor, _, slots) in enumerate(slots_by_definition(batch, block_size)):
        for column, k in enumerate(slots):
            state, label = hidden[b, m % anchors, k], batch.input_ids[b, anchor + k]
            log_q, top = dense_log_prob(head, state[None], label[None])
            log_prob[m, column], correct[m, column] = log_q[0], top[0] == label
            confidence[m, column] = said[b, m % anchors, k]
            valid[m, column] = predicted[b, m % anchors, k] = True
            q = (state @ head.weight.T).log_softmax(-1)
            p = (last[b * length + anchor + k - 1] @ head.weight.T).log_softmax(-1)
            kl[m, column] = (p.exp() * (p - q)).sum()
            overlap[m, column] = torch.minimum(p, q).exp().sum()
    for scores in found.values():
        torch.testing.assert_close(scores.log_prob, log_prob)
        assert torch.equal(scores.correct, correct & valid)
        assert torch.equal(scores.valid, valid)
        assert torch.equal(scores.confidence, confidence)
    torch.testing.assert_close(found["soft"].kl, kl)
    torch.testing.assert_close(found["target"].overlap, overlap)
    twin = BlockScores(log_prob, correct, valid)
    ours = CombinedLoss()(found["soft"], progress=1.0).total
    torch.testing.assert_close(ours, total(twin))
    (grad,) = torch.autograd.grad(ours, hidden)
    (twin_grad,) = torch.autograd.grad(total(twin), hidden)
    torch.testing.assert_close(grad, twin_grad)
    assert (grad[~predicted] == 0).all()  # shown slots, the anchor's, and those that count nowhere


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_with_a_reduced_vocabulary_and_a_confidence_head_scores_are_the_twins(fixed_shape):
    batch, block_size, whole = some_batch(4), 6, make_head(vocab=140)
    kept = torch.arange(0, 140, 3)
    head = ReducedHead.of(whole, kept)
    rows, anchors = batch.anchors.shape
    length = batch.input_ids.shape[1]
    torch.manual_seed(0)
    hidden = torch.randn(rows, anchors, block_size, 7, dtype=torch.float64, requires_grad=True)
    last = torch.randn(rows * length, 7, dtype=torch.float64)
    said = torch.randn(rows, anchors, block_size, dtype=torch.float64, requires_grad=True)
    found = score_blocks(
        head,
        hidden,
        build_blocks(batch, block_size, MASK),
        soft=soft_labels(head.rows, last),
        target=TargetStates(last, 1.0, ("overlap",), head),
        confidence=said,
        fixed_shape=fixed_shape,
    )
    shape = (rows * anchors, block_size - 1)
    twin = {name: torch.zeros(shape, dtype=torch.float64) for name in ("log_prob", *READ)}
    twin |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("correct", "valid", "outside")}
    for m, (b, anchor, _, slots) in enumerate(slots_by_definition(batch, block_size)):
        for column, k in enumerate(slots):
            place = (m, column)
            label = int(batch.input_ids[b, anchor + k])
            logits_p = whole.logits(last[b * length + anchor + k - 1])
            log_p = logits_p.log_softmax(-1)[kept]  # of all tokens
            again = logits_p[kept].log_softmax(-1)  # renormalised
            log_q = whole.logits(hidden[b, m % anchors, k])[kept].log_softmax(-1)
            twin["valid"][place], twin["outside"][place] = True, label % 3 != 0
            inside = label % 3 == 0
            twin["log_prob"][place] = log_q[label // 3] if inside else -torch.inf
            twin["correct"][place] = inside and int(log_q.argmax()) == label // 3
            twin["kl"][place] = (again.exp() * (again - log_q)).sum()
            twin["overlap"][place] = torch.minimum(log_p, log_q).exp().sum()
            twin["confidence"][place] = said[b, m % anchors, k]
    assert twin["outside"].any()
    assert (twin["valid"] & ~twin["outside"]).any()
    for name, value in twin.items():
        ours = getattr(found, name)
        torch.testing.assert_close(ours & found.valid if name == "correct" else ours, value)
    extra = {"overlap": WeightedTerm(Overlap()), "confidence": WeightedTerm(Confidence())}
    loss = CombinedLoss(alpha_kl=0.5, extra=extra)
    totals = [loss(scores, 0.5).total for scores in (found, BlockScores(**twin))]
    torch.testing.assert_close(*totals)
    for own, other in zip(*(torch.autograd.grad(t, (hidden, said)) for t in totals), strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_showing_nothing_is_the_plain_loss_bit_for_bit(fixed_shape):
    batch, head = some_batch(2), make_head(vocab=140, dtype=torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 6, 7)
    found = []
    for visible in (None, torch.zeros_like(batch.visible)):
        one = dataclasses.replace(batch, visible=visible)
        blocks, states = build_blocks(one, 6, MASK), hidden.clone().requires_grad_()
        loss = CombinedLoss()(score_blocks(head, states, blocks, fixed_shape=fixed_shape), 1.0)
        loss.total.backward()
        found.append((blocks.input_ids, blocks.labels, blocks.valid, loss.total, states.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("base", [0.5, 0.9, 1.0])
def test_lengths_follow_their_law_up_to_the_last_but_one_valid_slot(base):
    block_size, count = 6, 20_000
    # the document's end leaves 3 valid slots, the block 5, and a single one shows nothing
    supervised = np.ones(40, dtype=bool)
    for anchor, slots in ((36, 3), (10, 5), (38, 1)):
        drawn = VisiblePrefix(0.75, base).sample(
            supervised, np.full(count, anchor), block_size, **KEY
        )
        most = slots - 1
        weights = base ** np.arange(1, most + 1)
        law = np.concatenate([[0.25], 0.75 * weights / weights.sum()]) if most else np.ones(1)
        shares = np.bincount(drawn, minlength=len(law)) / count
        assert len(shares) == len(law)
        np.testing.assert_allclose(shares, law, atol=0.015)


def test_a_gap_ends_what_can_be_shown():
    supervised = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=bool)
    prefix = VisiblePrefix(1.0, 1.0)
    drawn = np.stack(
        [
            prefix.sample(supervised, np.array([0, 1, 4]), 16, **KEY | {"epoch": epoch})
            for epoch in range(60)
        ]
    )
    assert [set(column) for column in drawn.T] == [{1}, {0}, {1, 2, 3, 4}]


def dataset(rows, share=0.6, **settings):
    prefix = VisiblePrefix(share)
    return BatchDataset(
        rows, num_anchors=3, block_size=5, seed=5, visible_prefix=prefix, **settings
    )


def test_draws_depend_on_the_row_alone_and_leave_the_anchors_as_they_are():
    rows = make_rows()
    item = Item(4, 2, True)
    alone = dataset(rows)[[item]]
    beside = dataset(rows)[[Item(9, 2, True), item]]
    assert torch.equal(beside.visible[1], alone.visible[0])
    plain = dataset(rows, share=0.0)[[item]]
    assert plain.visible is None
    assert torch.equal(plain.anchors, alone.anchors)
    others = [dataset(rows)[[Item(4, epoch, True)]].visible.tolist() for epoch in range(8)]
    assert len({str(one) for one in others}) > 1
    assert dataset(rows, resample=False)[[item]].visible.tolist() == others[0]


def test_packed_rows_show_the_same_slots():
    rows = make_rows()
    items = [Item(i, 0, True) for i in range(8)]
    apart, packed = dataset(rows)[items], dataset(rows, pack_length=64)[items]
    assert packed.packed
    assert torch.equal(packed.valid_counts, apart.valid_counts)

    def found(batch):
        blocks = build_blocks(batch, 5, MASK)
        parts = (blocks.input_ids, blocks.labels, blocks.valid, blocks.positions)
        inside = batch.anchors.flatten() >= 0
        return sorted(torch.cat([p.flatten(0, 1)[inside] for p in parts], -1).tolist())

    assert found(packed) == found(apart)


def loader(rank=0, world=1, accumulate=2):
    rows = make_rows()
    order = EpochBatches(len(rows), 4 // world, seed=5, rank=rank, world_size=world)
    return DraftLoader(dataset(rows), order, accumulate=accumulate)


def test_window_counts_are_those_of_the_predicted_slots_on_any_number_of_ranks():
    alone, (first, second) = list(loader()), (list(loader(rank, 2)) for rank in range(2))
    assert any(int(batch.visible.sum()) for batch in alone)
    for step, (one, two, whole) in enumerate(zip(first, second, alone, strict=True)):
        window = alone[step - step % 2 : step - step % 2 + 2]
        valid = [build_blocks(batch, 5, MASK).valid for batch in window]
        counts = sum(mask.sum((0, 1)) for mask in valid)
        assert torch.equal(whole.window_counts, counts)
        assert torch.equal(one.window_counts + two.window_counts, counts)
        assert whole.num_slots == int(valid[step % 2].sum())


def test_a_resumed_epoch_shows_the_same_slots():
    unbroken, stopped, resumed = list(loader()), loader(), loader()
    given = iter(stopped)
    for _ in range(3):
        next(given)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == len(unbroken) - 3
    for ours, theirs in zip(rest, unbroken[3:], strict=True):
        assert torch.equal(ours.visible, theirs.visible)
        assert torch.equal(ours.window_counts, theirs.window_counts)


def test_a_filler_row_shows_nothing():
    batch = dataset(make_rows())[[Item(0, 0, scored=False)]]
    assert batch.visible.tolist() == [[0]]
    assert batch.num_slots == 0


@pytest.mark.parametrize("wrong", [{"share": 1.1}, {"share": -0.1}, {"base": 0.0}, {"base": 1.1}])
def test_a_setting_out_of_range_is_one_sentence(wrong):
    with pytest.raises(UserError, match="visible_prefix"):
        VisiblePrefix(**wrong)


# ---------------------------------------------------------------------- in a run


def test_a_run_trains_on_them_validates_without_and_records_its_steps(tmp_path):
    run = cli(tmp_path, trainer__max_steps=2, data__visible_prefix={"share": 1.0, "base": 1.0})
    made = batches(run, of=2)
    assert any(int(batch.visible.sum()) for batch in made)
    (held_out,) = {batch.visible for batch in run.datamodule.val_dataloader()}
    assert held_out is None
    graphs = recorded(run.model)
    for batch in made:
        found = []
        for forward in (graphs, run.model):
            run.model.zero_grad()
            scores = forward(batch)
            run.model.loss(scores, 1.0).total.backward()
            found.append([scores.log_prob.detach(), *(p.grad for p in run.model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert len(graphs) > 0
