"""Guards A2 (one-position shift), A15 (labels of another document), B15 and anchor sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafter.blocks import DraftBatch, build_blocks, candidates, count_valid, sample_anchors

MASK = 999


def make_batch(
    supervised: list[list[bool]], anchors: list[list[int]], documents: list[list[int]] | None = None
) -> DraftBatch:
    rows, length = len(supervised), len(supervised[0])
    document_ids = torch.tensor(documents) if documents else torch.zeros(rows, length).long()
    positions = torch.stack(
        [
            torch.tensor([int((row[: i + 1] == row[i]).sum()) - 1 for i in range(length)])
            for row in document_ids
        ]
    )
    return DraftBatch(
        input_ids=100 + torch.arange(length).repeat(rows, 1),
        supervised=torch.tensor(supervised),
        document_ids=document_ids,
        positions=positions,
        anchors=torch.tensor(anchors),
        sample_ids=torch.arange(rows),
    )


def valid_by_definition(batch: DraftBatch, block_size: int) -> torch.Tensor:
    """method.md: slot k is valid iff slots 1..k lie in the same document and supervised span."""
    rows, anchors = batch.anchors.shape
    out = torch.zeros(rows, anchors, block_size - 1, dtype=torch.bool)
    for b in range(rows):
        for a in range(anchors):
            anchor = int(batch.anchors[b, a])
            for k in range(1, block_size):
                if anchor < 0 or anchor + k >= batch.input_ids.shape[1]:
                    break
                same = batch.document_ids[b, anchor + k] == batch.document_ids[b, anchor]
                if not (same and batch.supervised[b, anchor + k]):
                    break
                out[b, a, k - 1] = True
    return out


def test_labels_are_the_tokens_at_anchor_plus_k_without_a_shift():
    batch = make_batch([[True] * 32], [[8]])
    blocks = build_blocks(batch, 4, MASK)
    assert blocks.labels.tolist() == [[[109, 110, 111]]]
    assert blocks.input_ids.tolist() == [[[108, MASK, MASK, MASK]]]
    assert blocks.positions.tolist() == [[[8, 9, 10, 11]]]


def test_an_unsupervised_gap_ends_the_block_for_good():
    supervised = [[True, True, True, False, True, True, True, True]]
    blocks = build_blocks(make_batch(supervised, [[0]]), 6, MASK)
    assert blocks.valid.tolist() == [[[True, True, False, False, False]]]
    assert blocks.labels.tolist() == [[[101, 102, 0, 0, 0]]]


@pytest.mark.parametrize("seed", range(20))
def test_validity_equals_its_definition_on_random_packed_rows(seed):
    draw = np.random.default_rng(seed)
    length, rows, anchors, block_size = 37, 3, 9, int(draw.integers(2, 9))
    cut = np.sort(draw.integers(1, length, size=(rows, 2)), axis=1)
    documents = [[int(i >= c[0]) + int(i >= c[1]) for i in range(length)] for c in cut]
    supervised = (draw.random((rows, length)) < 0.8).tolist()
    chosen = draw.integers(-1, length, size=(rows, anchors)).tolist()
    batch = make_batch(supervised, chosen, documents)
    blocks = build_blocks(batch, block_size, MASK)
    # an anchor may stand on an unsupervised token here; sampling never chooses one
    assert torch.equal(blocks.valid, valid_by_definition(batch, block_size))
    assert torch.equal(count_valid(batch, block_size), blocks.valid.sum((0, 1)))


def test_no_scored_slot_lies_in_another_document_than_its_anchor():
    documents = [[0] * 20 + [1] * 20]
    batch = make_batch([[True] * 40], [list(range(39))], documents)
    blocks = build_blocks(batch, 8, MASK)
    for a, anchor in enumerate(range(39)):
        slots = torch.arange(anchor + 1, anchor + 8)[blocks.valid[0, a]]
        assert ((slots < 20) == (anchor < 20)).all()
    assert not blocks.valid[0, 19].any()
    assert blocks.positions[0, 25].tolist() == list(range(5, 13))


def test_the_last_candidate_counts_and_needs_a_supervised_successor():
    supervised = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)
    assert candidates(supervised).tolist() == [1, 6, 7]
    drawn = {
        int(a)
        for epoch in range(50)
        for a in sample_anchors(supervised, 1, seed=0, sample_id=0, epoch=epoch)
    }
    assert drawn == {1, 6, 7}


def test_anchors_depend_on_seed_sample_and_epoch_only():
    supervised = np.ones(64, dtype=bool)

    def draw(**key: int) -> list[int]:
        return sample_anchors(supervised, 8, **key).tolist()

    first = draw(seed=1, sample_id=2, epoch=3)
    assert first == draw(seed=1, sample_id=2, epoch=3) == sorted(set(first))
    assert first != draw(seed=1, sample_id=2, epoch=4)
    assert first != draw(seed=1, sample_id=3, epoch=3)
    assert first != draw(seed=2, sample_id=2, epoch=3)


def test_fewer_candidates_than_anchors_gives_invalid_blocks():
    anchors = sample_anchors(np.array([0, 1, 1, 1], dtype=bool), 5, seed=0, sample_id=0, epoch=0)
    assert anchors.tolist() == [1, 2, -1, -1, -1]
    batch = make_batch([[False, True, True, True]], [anchors.tolist()])
    assert build_blocks(batch, 4, MASK).valid.sum().item() == 3


@pytest.mark.parametrize("length", [15, 16, 17])
def test_row_length_need_not_divide_by_the_block_size(length):
    batch = make_batch([[True] * length], [[0, 6]])
    blocks = build_blocks(batch, 8, MASK)
    assert blocks.labels[0, 1].tolist() == [107, 108, 109, 110, 111, 112, 113]
