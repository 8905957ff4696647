"""Guards C10 (what tau counts) and C11 (averages of averages), by examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from drafter.metrics import AcceptanceByPosition, AcceptedLength, WasteRatio, prefix_match_lengths
from drafter.replay import SlotResults, count_decoded, count_rounds
from drafter.verification import Round, clip_round, verify_greedy


def greedy_slots(match_rows, num_drafted):
    """Slots of a response from rows of 0 and 1; a row is as long as its slots within the text."""
    match = np.zeros((len(match_rows), num_drafted), dtype=bool)
    valid = np.zeros_like(match)
    for row, values in enumerate(match_rows):
        assert len(values) == min(num_drafted, len(match_rows) - row)
        match[row, : len(values)], valid[row, : len(values)] = values, True
    return SlotResults(match.astype(np.int64), match, valid, match.astype(np.float64))


# Six tokens, K = 4. Rounds by hand: anchor 0 accepts 1, anchor 2 accepts 0, anchor 3 accepts both
# tokens that are left, and the response ends with them, so it has no bonus.
HAND = [[1, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1], [1]]
# Three tokens: anchor 0 accepts 0, anchor 1 accepts 1 of 1.
SHORT = [[0, 1], [1]]
ONE_TOKEN = greedy_slots([], 3)


def hand_counts():
    return count_rounds(greedy_slots(HAND, 3))


def short_counts():
    slots = greedy_slots(SHORT, 2)
    wide = [np.pad(x, ((0, 0), (0, 1))) for x in (slots.match, slots.valid)]
    return count_rounds(SlotResults(wide[0].astype(np.int64), *wide, wide[0].astype(np.float64)))


C11_BLOCKS = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()


@pytest.mark.parametrize("cuts", [(3,), (2, 1), (1, 2), (1, 1, 1)])
def test_mean_run_is_not_a_product_of_accuracies_nor_a_mean_of_batch_means(cuts):
    runs = torch.cat(
        [prefix_match_lengths(part, torch.ones_like(part)) for part in C11_BLOCKS.split(cuts)]
    )
    assert runs.tolist() == [2, 1, 0]
    assert runs.double().mean().item() == 1.0
    assert (runs + 1).double().mean().item() == 2.0
    accuracy = C11_BLOCKS.double().mean(0)
    assert accuracy.cumprod(0).sum().item() == pytest.approx(1.407, abs=1e-3)  # the known mistake


def test_a_right_slot_past_the_end_counts_for_no_run():
    correct = torch.ones(2, 3, dtype=torch.bool)
    valid = torch.tensor([[True, False, False], [True, True, True]])
    assert prefix_match_lengths(correct, valid).tolist() == [1, 3]


def test_tokens_after_a_rejection_are_not_accepted():
    verdict = verify_greedy([5, 6, 7], [5, 9, 7, 8])  # match vector [1, 0, 1]
    assert verdict == (1, 9)
    round_ = clip_round([5, 6, 7], verdict, eos_token_ids=(), remaining=9, block_size=4)
    assert (round_.accepted, round_.length, round_.unclipped) == (1, 2, 2)
    replayed = count_rounds(greedy_slots([[1, 0, 1], [0, 0], [0]], 3))
    assert replayed.round_lengths[0] == 2
    assert replayed.round_accepted[0] == 1


@pytest.mark.parametrize(("place", "accepted", "unclipped"), [(3, 3, 9), (8, 8, 9), (1, 1, 9)])
def test_tokens_after_an_eos_are_not_counted(place, accepted, unclipped):
    draft = [10, 11, 12, 13, 14, 15, 16, 17]  # all accepted, block_size 9
    round_ = clip_round(
        draft,
        verify_greedy(draft, [*draft, 18]),
        eos_token_ids=(9 + place,),
        remaining=100,
        block_size=9,
    )
    assert round_ == Round(draft[:place], accepted, unclipped, True)


@pytest.mark.parametrize("remaining", range(1, 6))
def test_the_limit_clips_a_round_and_its_bonus(remaining):
    draft = [10, 11, 12]
    round_ = clip_round(
        draft, verify_greedy(draft, [*draft, 13]), eos_token_ids=(), remaining=remaining,
        block_size=4,
    )  # fmt: skip
    assert round_.tokens == [10, 11, 12, 13][:remaining]
    assert round_.accepted == min(3, remaining)
    assert round_.finished == (remaining <= 4)
    assert round_.unclipped == 4


def test_a_correction_that_is_an_eos_ends_the_response_without_a_full_block():
    round_ = clip_round(
        [10, 11, 12],
        verify_greedy([10, 11, 12], [10, 2, 0, 0]),
        eos_token_ids=(1, 2),
        remaining=9,
        block_size=4,
    )
    assert round_ == Round([10, 2], 1, 2, True)


def test_rounds_of_the_hand_example():
    counts = hand_counts()
    assert counts.round_lengths == (2, 1, 2)
    assert counts.round_accepted == (1, 0, 2)
    sums = (counts.emitted, counts.rounds, counts.accepted, counts.drafted, counts.unclipped)
    assert sums == (5, 3, 3, 8, 2 + 1 + 4)
    assert counts.accepted_at.tolist() == [2, 1, 0]
    assert counts.reached_at.tolist() == [3, 2, 0]
    assert (counts.matched, counts.wasted) == (6, 3)
    assert (counts.matched_all_anchors, counts.wasted_all_anchors) == (9, 5)


def test_the_loops_sums_equal_the_hand_example():
    response = [10, 11, 12, 13, 14, 15]
    drafts = [[11, 0, 13], [0, 14, 15], [14, 15, 11]]  # the last slot lies past the end
    rounds = [
        Round([11, 12], 1, 2, False), Round([13], 0, 1, False), Round([14, 15], 2, 4, True)
    ]  # fmt: skip
    looped, replayed = count_decoded(rounds, drafts, response), hand_counts()
    for name in ("emitted", "rounds", "accepted", "drafted", "unclipped", "matched", "wasted"):
        assert getattr(looped, name) == getattr(replayed, name), name
    for name in ("accepted_at", "reached_at"):
        assert getattr(looped, name).tolist() == getattr(replayed, name).tolist(), name
    assert looped.round_lengths == replayed.round_lengths
    assert looped.round_accepted == replayed.round_accepted


def test_pooled_and_per_response_lengths_are_told_apart():
    metric = AcceptedLength()
    metric.update(hand_counts())
    metric.update(short_counts())
    out = {name: value.item() for name, value in metric.compute().items()}
    assert out["accepted_length"] == pytest.approx((5 + 2) / (3 + 2))
    assert out["accepted_length_per_response"] == pytest.approx((5 / 3 + 2 / 2) / 2)
    assert out["accepted_per_round"] == pytest.approx((3 + 1) / 5)  # not accepted_length - 1 = .4
    assert out["drafted_per_round"] == pytest.approx((8 + 3) / 5)
    assert out["accepted_length_unclipped"] == pytest.approx((7 + 1 + 4) / 5)
    assert (out["rounds"], out["responses"], out["responses_without_round"]) == (5, 2, 0)


def test_a_response_of_one_token_changes_no_mean_but_is_counted():
    counts = count_rounds(ONE_TOKEN)
    assert (counts.rounds, counts.emitted, counts.drafted) == (0, 0, 0)
    assert count_decoded([], [], [7]).rounds == 0
    metric, alone = AcceptedLength(), AcceptedLength()
    by_position = AcceptanceByPosition(3)
    for one_token in (counts, count_decoded([], [], [7])):
        metric.update(one_token)
        by_position.update(one_token)
    assert all(math.isnan(metric.compute()[k].item()) for k in ("accepted_length",
               "accepted_length_per_response", "accepted_per_round"))  # fmt: skip
    assert by_position.compute().isnan().all()
    metric.update(hand_counts())
    alone.update(hand_counts())
    for name, value in alone.compute().items():
        if not name.startswith("responses"):
            assert metric.compute()[name].item() == value.item(), name
    assert metric.compute()["responses"].item() == 3
    assert metric.compute()["responses_without_round"].item() == 2


def test_acceptance_by_position_is_conditional_on_reaching_the_slot():
    metric = AcceptanceByPosition(3)
    metric.update(hand_counts())
    out = metric.compute()
    assert out[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert out[2].isnan()  # the one round that got there had no such slot within the text
    metric.update(short_counts())
    assert metric.compute()[:2].tolist() == pytest.approx([3 / 5, 1 / 2])


def test_waste_is_relative_to_what_was_right_on_the_rounds_walked():
    metric = WasteRatio()
    metric.update(hand_counts())
    out = {name: value.item() for name, value in metric.compute().items()}
    assert out["waste_ratio"] == pytest.approx(3 / 6)
    assert out["waste_ratio_all_anchors"] == pytest.approx(5 / 9)
    assert out["waste_ratio_of_drafted"] == pytest.approx(3 / 8)


@pytest.mark.parametrize("make", [AcceptedLength, lambda: AcceptanceByPosition(3), WasteRatio])
def test_ranks_states_add_up_to_the_whole(make):
    responses = [hand_counts(), short_counts(), count_rounds(ONE_TOKEN), hand_counts()]
    whole, ranks = make(), [make(), make()]
    for index, counts in enumerate(responses):
        whole.update(counts)
        ranks[0 if index == 0 else 1].update(counts)  # unequal shares
    merged = make()
    for name, reduction in whole._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))
        assert getattr(merged, name).dtype == torch.float64
    merged._update_count = 1
    ours, theirs = whole.compute(), merged.compute()
    if isinstance(ours, dict):
        ours, theirs = (torch.stack(list(part.values())) for part in (ours, theirs))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12, equal_nan=True)
