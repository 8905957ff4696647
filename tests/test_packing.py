"""Several conversations in a row (A15): nothing leaks, and the loss is that of separate rows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from data.online import OnlineHiddenStates
from drafter.blocks import Span, build_blocks
from drafter.packing import pack, place
from drafter.soft_labels import soft_labels
from tests.runs import cli, config, weights

ROWS = 8


def batches(folder, **changes):
    given = config(folder)["data"] | {"batch_size": ROWS} | changes
    datamodule = OnlineHiddenStates(**given, block_size=4)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    batch = next(iter(loader))
    return datamodule, datamodule.add_features(batch, (0, 2), last_hidden="soft_labels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("packing")
    config(made)
    return made


def test_documents_lie_end_to_end_and_none_is_lost():
    lengths = [20, 3, 57, 20, 31, 8, 1, 64, 90]
    spans = pack(lengths, 64)
    assert [span.last - span.first for span in spans] == lengths
    for row in range(1 + max(span.row for span in spans)):
        own = sorted(span for span in spans if span.row == row)
        assert own[0].first == 0
        assert all(a.last == b.first for a, b in itertools.pairwise(own))
        assert own[-1].last <= 64 or len(own) == 1  # 90 tokens have a row of their own
    assert 1 + max(span.row for span in spans) <= 5  # 294 tokens: 64 + 90 + 140 of the others


def test_many_short_documents_share_no_row_with_a_long_one_if_that_is_more_work():
    lengths, slots = [2048, *[40] * 7], 48 * 16
    spans = pack(lengths, 2048, slots)
    rows = 1 + max(span.row for span in spans)
    fullest = max(sum(span.row == row for span in spans) for row in range(rows))
    work = rows * (max(span.last for span in spans) + slots * fullest)
    for most in range(1, 9):
        other = pack(lengths, 2048, slots, most)
        rows = 1 + max(span.row for span in other)
        assert max(sum(span.row == row for span in other) for row in range(rows)) <= most
    assert work <= 2 * (2048 + slots * 7)  # all short ones in one row
    assert work <= 8 * (2048 + slots)  # each in its own


def test_rows_in_another_order_count_as_packed(folder):
    """Longest first, even where every document has a row of its own: row i is not sample i."""
    _, batch = batches(folder, pack_length=1)
    assert len(batch.input_ids) == ROWS
    assert batch.packed
    assert not batches(folder)[1].packed


def test_places_of_short_parts_are_zero_behind_them():
    out = place([torch.ones(2, 1), torch.ones(3, 1)], [Span(0, 1, 5), Span(0, 5, 8)], 1, 9)
    assert out[0, :, 0].tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("keep", [False, True])
def test_packed_batches_hold_the_same_blocks_and_features(folder, keep):
    _, apart = batches(folder)
    module, packed = batches(folder, pack_length=128, keep_in_memory=keep)
    assert packed.packed
    assert not apart.packed
    assert len(packed.input_ids) < len(apart.input_ids) == ROWS
    assert torch.equal(packed.sample_ids, apart.sample_ids)
    assert torch.equal(packed.valid_counts, apart.valid_counts)
    head = module.target.head
    if keep:  # what a loss makes of last_hidden is kept in its place
        made = soft_labels(head, apart.last_hidden.flatten(0, 1)).packed()
        apart.soft_labels = made.view(*apart.input_ids.shape, -1)
    last_name = "soft_labels" if keep else "last_hidden"
    for i, (row, first, last) in enumerate(packed.spans):
        own = slice(0, last - first)
        for name in ("input_ids", "supervised", "positions"):
            a, b = getattr(packed, name), getattr(apart, name)
            assert torch.equal(a[row, first:last], b[i, own]), name
        for name in ("hidden_states", last_name):
            a, b = getattr(packed, name), getattr(apart, name)
            torch.testing.assert_close(a[row, first:last], b[i, own], atol=1e-5, rtol=1e-5)
        inside = packed.anchors[row]
        inside = inside[(inside >= first) & (inside < last)] - first
        assert torch.equal(inside, apart.anchors[i][apart.anchors[i] >= 0])
    if keep:
        before = packed.hidden_states.clone()
        again = dataclasses.replace(packed, hidden_states=None, soft_labels=None)
        module.add_features(again, (0, 2), True)
        assert torch.equal(again.hidden_states, before)
        assert torch.equal(again.soft_labels, packed.soft_labels)


def test_loss_and_gradient_are_those_of_separate_rows_added_up(folder):
    """One batch packed, the same rows apart, and the sum of each row's own loss."""
    run = cli(folder, trainer__max_epochs=1, run_dir=str(folder / "trained"))
    module = run.model
    layers = module.drafter.config.target_layer_ids
    found = {}
    for name, changes in {"packed": {"pack_length": 128}, "apart": {}}.items():
        _, batch = batches(folder, **changes)
        batch.hidden_states = None
        batch = run.datamodule.add_features(batch, layers)
        module.zero_grad()
        out = module.loss(module(batch), 1.0)
        out.total.backward()
        found[name] = (
            {term: ratio.detach() for term, ratio in out.terms.items()},
            [p.grad.clone() for p in module.drafter.parameters()],
        )
    for term, ratio in found["apart"][0].items():
        packed = found["packed"][0][term]
        torch.testing.assert_close(packed.numerator, ratio.numerator, atol=1e-4, rtol=1e-4)
        assert packed.denominator == pytest.approx(float(ratio.denominator), rel=1e-6)
    for a, b in zip(found["packed"][1], found["apart"][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)

    sums: dict[str, torch.Tensor] = {}
    for sample in range(ROWS):
        _, batch = batches(folder)
        alone = torch.full_like(batch.anchors, -1)
        alone[sample] = batch.anchors[sample]
        batch = dataclasses.replace(
            batch, anchors=alone, hidden_states=None, num_slots=None, valid_counts=None
        )
        out = module.loss(module(run.datamodule.add_features(batch, layers)), 1.0)
        for term, ratio in out.terms.items():
            sums[term] = sums.get(term, torch.zeros(())) + ratio.detach().numerator
    for term, total in sums.items():
        torch.testing.assert_close(found["packed"][0][term].numerator, total, atol=1e-4, rtol=1e-4)


def test_another_documents_tokens_change_nothing(folder):
    run = cli(folder, trainer__max_epochs=1, run_dir=str(folder / "leak"))
    _, batch = batches(folder, pack_length=128)
    layers = run.model.drafter.config.target_layer_ids
    first, other = next(
        (a, b) for a in batch.spans for b in batch.spans if a.row == b.row and b.first == a.last
    )

    def log_probabilities():
        run.datamodule.add_features(batch, layers)
        scores = run.model(batch)
        inside = (batch.anchors >= first.first) & (batch.anchors < first.last)
        inside[torch.arange(len(inside)) != first.row] = False
        return scores.log_prob[inside.flatten()].detach()

    before = log_probabilities()
    batch.input_ids[other.row, other.first : other.last] = 5
    batch.hidden_states = None
    assert len(before) > 0
    assert torch.equal(log_probabilities(), before)
    blocks = build_blocks(batch, 4, 0)
    ends = blocks.anchors.unsqueeze(-1) + torch.arange(1, 4)
    inside = blocks.valid & (blocks.anchors < first.last).unsqueeze(-1)
    inside[torch.arange(len(inside)) != first.row] = False
    assert bool((ends[inside] < first.last).all())  # no scored slot crosses the border


def test_a_run_with_packed_rows_trains_the_same_drafter(folder):
    runs = [
        cli(folder, run_dir=str(folder / f"run{length}"), data__pack_length=length)
        for length in (0, 128)
    ]
    a, b = map(weights, runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-3)
