"""A17: shares of ranks and micro-batches must add up to the single-process loss of the window."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from losses import CombinedLoss
from tests import losses_twins as twins
from tests.runs import forked, joined

NUM_SLOTS = 7
RANK_0 = (7, 3)  # 10 scored slots
RANK_1 = (7,) * 11 + (6, 5, 0, 2)  # 90 scored slots, one block without any
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def over_ranks(loss, parts, counts=None):
    """One micro-batch a rank, with a sum over ranks made in-process; checks one call a rank."""
    counts = counts or [None] * len(parts)
    vectors = []

    def record(vector):
        vectors.append(vector.clone())
        return vector

    for scores, counts_N in zip(parts, counts, strict=True):
        loss(scores, 0.0, counts_N, record)
    assert len(vectors) == len(parts), "reduce must be called exactly once a rank"
    assert len({(v.shape, v.dtype) for v in vectors}) == 1, "ranks would drift apart"
    assert all(v.ndim == 1 and not v.requires_grad for v in vectors)
    summed = torch.stack(vectors).sum(0)
    return [
        loss(scores, 0.0, counts_N, lambda _: summed.clone())
        for scores, counts_N in zip(parts, counts, strict=True)
    ]


def gradients(outs, parts):
    return torch.cat(
        [twins.gradient(out.total, scores) for out, scores in zip(outs, parts, strict=True)]
    )


def rank_scores(dtype=torch.float64):
    return [
        twins.random_scores(RANK_0, NUM_SLOTS, seed=1, dtype=dtype),
        twins.random_scores(RANK_1, NUM_SLOTS, seed=2, dtype=dtype),
    ]


def test_two_ranks_with_10_and_90_scored_slots_give_the_single_process_gradient():
    parts = rank_scores()
    assert [int(p.valid.sum()) for p in parts] == [10, 90]
    outs, union = over_ranks(CombinedLoss(), parts), twins.joined(parts)
    expected = twins.total(union)
    torch.testing.assert_close(sum(out.total for out in outs), expected, **EXACT)
    torch.testing.assert_close(gradients(outs, parts), twins.gradient(expected, union), **EXACT)
    # and this test would see a mean of the ranks' own means, which is what Lightning takes
    own = sum(CombinedLoss()(p, 0.0).total for p in parts) / 2
    assert abs(own - expected) > 1e-2


def test_two_ranks_in_fp32_agree_with_the_single_process_to_rounding():
    parts = rank_scores(torch.float32)
    union = twins.joined(parts)
    torch.testing.assert_close(
        gradients(over_ranks(CombinedLoss(), parts), parts),
        twins.gradient(CombinedLoss()(union, 0.0).total, union),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_rank_without_a_valid_block_stays_connected_and_changes_nothing(empty_first):
    some = twins.random_scores((7, 3, 1), NUM_SLOTS, seed=3)
    empty = twins.random_scores((0, 0), NUM_SLOTS, seed=4)
    parts = [empty, some] if empty_first else [some, empty]
    outs = over_ranks(CombinedLoss(), parts)
    total = {id(scores): out.total for out, scores in zip(outs, parts, strict=True)}
    assert total[id(empty)].item() == 0
    assert torch.equal(twins.gradient(total[id(empty)], empty), torch.zeros(2, NUM_SLOTS).double())
    expected = twins.total(some)
    torch.testing.assert_close(total[id(some)], expected, **EXACT)
    torch.testing.assert_close(
        twins.gradient(total[id(some)], some), twins.gradient(expected, some), **EXACT
    )


def test_no_valid_block_on_any_rank_is_zero_everywhere():
    parts = [twins.random_scores((0,), NUM_SLOTS, seed=s) for s in (1, 2)]
    for out, scores in zip(over_ranks(CombinedLoss(), parts), parts, strict=True):
        assert out.total.item() == 0
        assert torch.equal(
            twins.gradient(out.total, scores), torch.zeros(1, NUM_SLOTS, dtype=torch.float64)
        )


def micro_batches(rank):
    lengths = [[(7, 7, 1), (2,), (0, 0)], [(7,) * 5, (3, 0), (7, 4, 4)]][rank]
    return [
        twins.random_scores(part, NUM_SLOTS, seed=10 * rank + i) for i, part in enumerate(lengths)
    ]


def window(loss, ranks):
    """All outputs of a window and their scores; ranks step through it together."""
    counts = [sum(scores.counts_N for scores in parts) for parts in ranks]
    outs, scores = [], []
    for micro in zip(*ranks, strict=True):
        outs += over_ranks(loss, list(micro), counts)
        scores += micro
    return outs, scores


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("normalize", ["block", "valid"])
def test_cross_entropy_and_chain_are_exact_under_accumulation(num_ranks, normalize):
    loss = CombinedLoss(alpha_focal=0.0, chain_normalize=normalize)
    outs, parts = window(loss, [micro_batches(rank) for rank in range(num_ranks)])
    union = twins.joined(parts)
    expected = twins.mean(twins.cross_entropy(union, 10.0)) - 40 * twins.mean(
        twins.chain(union, normalize)
    )
    torch.testing.assert_close(sum(out.total for out in outs), expected, **EXACT)
    torch.testing.assert_close(gradients(outs, parts), twins.gradient(expected, union), **EXACT)
    own = sum(loss(p, 0.0).total for p in parts) / len(parts)  # a mean of micro-batches' means
    assert abs(own - expected) > 1e-2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_focal_under_accumulation_weighs_each_micro_batch_by_its_valid_blocks(num_ranks):
    loss = CombinedLoss(alpha_focal=0.3, alpha_chain=0.0)
    ranks = [micro_batches(rank) for rank in range(num_ranks)]
    outs, _ = window(loss, ranks)
    window_blocks = sum(int(p.valid[:, 0].sum()) for parts in ranks for p in parts)
    expected, shares = 0.0, 0.0
    for micro in zip(*ranks, strict=True):
        pairs = [twins.focal(scores) for scores in micro]
        share = sum(int(p.valid[:, 0].sum()) for p in micro) / window_blocks
        expected += 0.3 * share * twins.mean((sum(n for n, _ in pairs), sum(d for _, d in pairs)))
        shares += share
    assert shares == pytest.approx(1.0)
    got = sum(out.contributions["focal"] for out in outs)
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_window_of_one_micro_batch_is_that_micro_batch():
    scores = twins.random_scores((7, 2, 0), NUM_SLOTS, seed=5, dtype=torch.float32)
    alone = CombinedLoss()(scores, 0.0)
    assert torch.equal(CombinedLoss()(scores, 0.0, scores.counts_N).total, alone.total)
    assert torch.equal(CombinedLoss()(scores, 0.0, reduce=torch.clone).total, alone.total)


def test_window_counts_of_another_block_size_are_refused():
    scores = twins.random_scores((7,), NUM_SLOTS, seed=6)
    with pytest.raises(ValueError, match="one count for each of the 7 drafted slots"):
        CombinedLoss()(scores, 0.0, torch.ones(8))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_vector_has_the_same_length_whether_a_term_is_on_or_off(alpha):
    lengths = []

    def record(vector):
        lengths.append(len(vector))
        return vector

    scores = twins.random_scores((7,), NUM_SLOTS, seed=7)
    CombinedLoss(alpha_focal=alpha)(scores, 0.0, reduce=record)
    CombinedLoss(alpha_focal=0.1)(scores, 0.0, reduce=record)
    assert lengths[0] == lengths[1]


def one_of_two(rank, folder):
    """Writes the loss and the gradient of a rank that adds up over gloo."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)

    def over_gloo(vector):
        vector = vector.clone()
        dist.all_reduce(vector)
        return vector

    scores = rank_scores(torch.float32)[rank]
    out = CombinedLoss()(scores, 0.0, reduce=over_gloo)
    torch.save((out.total.detach(), twins.gradient(out.total, scores)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_give_the_single_process_gradient(tmp_path):
    outputs = [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    workers = [
        forked(one_of_two, rank, tmp_path, output=output) for rank, output in enumerate(outputs)
    ]
    joined(workers, timeout=60)
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.exitcode == 0, output.read_text()
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    union = twins.joined(rank_scores(torch.float32))
    expected = CombinedLoss()(union, 0.0).total
    torch.testing.assert_close(saved[0][0] + saved[1][0], expected.detach())
    torch.testing.assert_close(
        torch.cat([saved[0][1], saved[1][1]]),
        twins.gradient(expected, union),
        atol=1e-6,
        rtol=1e-6,
    )
    assert math.isfinite(expected.item())
