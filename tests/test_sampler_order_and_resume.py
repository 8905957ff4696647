"""Guards E2/E4 (batches replayed or lost on resume) and D5 (rank skew)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batches import BatchDataset
from data.sampler import DraftLoader, EpochBatches
from drafter.errors import UserError


def make_rows(count=23, length=20):
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        n = int(draw.integers(8, length))
        supervised = np.zeros(n, dtype=bool)
        supervised[int(draw.integers(1, n - 2)) :] = True
        rows.append(
            SimpleNamespace(sample_id=i, input_ids=draw.integers(0, 99, n), supervised=supervised)
        )
    return rows


def make_loader(rank=0, world=1, batch_size=2, workers=0, accumulate=1, rows=None):
    rows = rows or make_rows()
    dataset = BatchDataset(rows, num_anchors=3, block_size=4, seed=5)
    batches = EpochBatches(len(rows), batch_size, seed=5, rank=rank, world_size=world)
    return DraftLoader(dataset, batches, num_workers=workers, accumulate=accumulate)


def trace(batches):
    return [(b.sample_ids.tolist(), b.anchors.tolist(), b.window_counts.tolist()) for b in batches]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_comes_once_an_epoch_whatever_the_world_size(world):
    seen, steps = [], set()
    for rank in range(world):
        sampler = EpochBatches(23, 2, seed=1, rank=rank, world_size=world)
        batches = list(sampler)
        steps.add(len(batches))
        assert len(batches) == len(sampler)
        seen += [item.row for batch in batches for item in batch if item.scored]
    assert sorted(seen) == list(range(23))
    assert len(steps) == 1  # ranks never run out at different steps


def test_a_global_batch_holds_the_same_rows_for_any_world_size():
    def rows_of_step(world, step):
        ranks = [
            list(EpochBatches(24, 12 // world, seed=1, rank=r, world_size=world))[step]
            for r in range(world)
        ]
        return sorted(item.row for batch in ranks for item in batch)

    assert rows_of_step(1, 1) == rows_of_step(2, 1) == rows_of_step(3, 1)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_a_global_batch_so_that_their_longest_rows_are_alike(world):
    lengths = np.random.default_rng(0).integers(1, 1000, 97)

    def step(rank, dealt, epoch):
        sampler = EpochBatches(
            97,
            4,
            seed=1,
            rank=rank,
            world_size=world,
            tokens=lambda row: int(lengths[row]) if dealt else 1,
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    firsts = set()
    for epoch in range(4):
        dealt, plain = ([step(rank, how, epoch) for rank in range(world)] for how in (True, False))
        for ours, theirs in zip(zip(*dealt, strict=True), zip(*plain, strict=True), strict=True):
            rows = [[item.row for item in batch if item.scored] for batch in ours]
            everyone = sorted(row for own in rows for row in own)
            assert everyone == sorted(i.row for b in theirs for i in b if i.scored)
            assert max(map(len, rows)) - min(map(len, rows)) <= 1
            if len(everyone) < 4 * world:
                continue  # the epoch's last
            ranked = sorted(lengths[everyone])[::-1]
            assert sorted(max(lengths[own]) for own in rows) == sorted(ranked[:world])
            firsts |= {rank for rank, own in enumerate(rows) if max(lengths[own]) == ranked[0]}
    assert firsts == set(range(world))  # the longest is not always the same rank's


def test_a_rank_without_rows_gets_a_filler_that_scores_nothing():
    rows = make_rows(5)
    loader = make_loader(rank=1, world=2, batch_size=2, rows=rows)
    last = list(loader)[-1]
    assert len(last.sample_ids) == 1
    assert (last.anchors == -1).all()
    assert last.valid_counts.sum() == 0
    assert last.num_slots == 0


def test_epochs_differ_and_are_reproducible():
    loader = make_loader()
    first = trace(loader)
    loader.sampler.set_epoch(1)
    second = trace(loader)
    assert first != second
    again = make_loader()
    again.sampler.set_epoch(1)
    assert trace(again) == second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("stop", [1, 4, 7, 12])
def test_a_loader_resumed_anywhere_goes_on_with_the_next_batch(workers, accumulate, stop):
    whole = make_loader(accumulate=accumulate)
    whole.sampler.set_epoch(3)
    expected = trace(whole)
    first = make_loader(workers=workers, accumulate=accumulate)
    first.sampler.set_epoch(3)
    iterator = iter(first)
    head = [next(iterator) for _ in range(stop)]
    state = first.state_dict()
    second = make_loader(workers=workers, accumulate=accumulate)
    second.load_state_dict(state)
    second.sampler.set_epoch(3)  # Lightning does this after loading the state
    assert trace(head) + trace(second) == (expected if stop < 12 else expected + expected)


def test_the_window_counts_are_those_of_the_whole_accumulation_window():
    loader = make_loader(accumulate=4)
    batches = list(loader)
    for start in range(0, len(batches), 4):
        window = batches[start : start + 4]
        counts = torch.stack([batch.valid_counts for batch in window]).sum(0)
        assert all(torch.equal(batch.window_counts, counts) for batch in window)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("batch_size", {"batch_size": 4}),
        ("world_size", {"world": 2}),
        ("accumulate_grad_batches", {"accumulate": 2}),
    ],
)
def test_resuming_under_another_order_is_refused_by_name(key, change):
    state = make_loader().state_dict()
    with pytest.raises(UserError, match=key):
        make_loader(**change).load_state_dict(state)
