"""The audit: silent where texts agree, explains a near tie, and convicts a planted fault."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from drafter.decoding import CachedTarget
from drafter.draft_vocabulary import ReducedHead
from drafter.evaluation.audit import Auditor, explain, first_difference
from drafter.evaluation.measure import (
    FeatureStore,
    decode_alone,
    decode_prompt,
    replay_trajectory,
)
from drafter.evaluation.trajectories import EvalPrompt, TrajectorySettings, generate_trajectories
from drafter.head import FrozenHead
from drafter.model import Drafter
from drafter.replay import replay_slots
from drafter.target import Target
from tests.tiny import tiny_target_dir
from tests.tiny_drafters import overfitted_drafter

SETTINGS = TrajectorySettings(40)
PROMPTS = [EvalPrompt("s", i, [7 + i, 8, 9 + i, 30 + i]) for i in range(12)]


def pair(tmp_path, dtype):
    folder = tiny_target_dir(tmp_path)
    drafter: Drafter = overfitted_drafter(Target.load(folder, dtype="float32"), PROMPTS[:3])
    target = Target.load(folder, dtype=dtype)
    return target, drafter.to(target.dtype)


def texts(target, drafter, auditor):
    found = []
    for prompt in PROMPTS:
        spec = decode_prompt(drafter, target, prompt.ids, SETTINGS, key=prompt.key)
        plain = decode_alone(target, prompt.ids, SETTINGS, key=prompt.key)
        found.append(auditor.compare_texts(prompt, spec.ids, plain.ids))
    return found


def test_in_fp32_nothing_parts(tmp_path):
    target, drafter = pair(tmp_path, "float32")
    assert texts(target, drafter, Auditor(target, drafter, SETTINGS)) == [None] * len(PROMPTS)


def test_in_bf16_every_parting_is_explained(tmp_path):
    target, drafter = pair(tmp_path, "bfloat16")
    found = texts(target, drafter, Auditor(target, drafter, SETTINGS, PROMPTS))
    assert any(found)  # or the test would see nothing
    assert all(divergence is None or divergence.explained for divergence in found)


def test_a_fault_in_the_verifying_pass_is_not_explained(tmp_path, monkeypatch):
    target, drafter = pair(tmp_path, "float32")
    auditor = Auditor(target, drafter, SETTINGS)
    right = CachedTarget.verify

    def faulty(self, block_ids):
        logits = right(self, block_ids)
        if len(block_ids) > 1 and len(self.committed) == 14:
            logits = logits.clone()
            logits[0, 77] = 1e4  # as a wrong position or a cache off by one would
        return logits

    monkeypatch.setattr(CachedTarget, "verify", faulty)
    found = [divergence for divergence in texts(target, drafter, auditor) if divergence]
    assert found
    # the pass was wrong by far more than rounding: its own error may not excuse it
    assert all(not divergence.explained for divergence in found)
    assert {77} <= set(found[0].tokens)


def test_replay_and_loop_agree_round_for_round_in_fp32(tmp_path):
    target, drafter = pair(tmp_path, "float32")
    auditor = Auditor(target, drafter, SETTINGS)
    for trajectory, looped, replayed in both_ways(target, drafter):
        assert auditor.compare_rounds(trajectory, *looped, replayed) is None


def test_replay_and_loop_part_only_at_explained_ties_in_bf16(tmp_path):
    target, drafter = pair(tmp_path, "bfloat16")
    auditor = Auditor(target, drafter, SETTINGS, PROMPTS)
    ways = list(both_ways(target, drafter))
    group = [trajectory for trajectory, _, _ in ways]
    found = [auditor.compare_rounds(t, *looped, replayed, group) for t, looped, replayed in ways]
    assert any(found)
    assert all(divergence is None or divergence.explained for divergence in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_round_is_convicted_at_the_slot_that_parts(tmp_path, dtype):
    """Round lengths of replay changed by hand, one at a time: no near tie elsewhere excuses it."""
    target, drafter = pair(tmp_path, dtype)
    auditor = Auditor(target, drafter, SETTINGS, PROMPTS)
    planted = 0
    for trajectory, (ids, lengths), replayed in list(both_ways(target, drafter))[:6]:
        if list(lengths) != list(replayed) or list(ids) != trajectory.ids:
            continue
        for place in range(0, len(lengths) - 1, 3):
            wrong = [*replayed]
            wrong[place] += 1 if wrong[place] < 4 else -1
            found = auditor.compare_rounds(trajectory, ids, lengths, wrong)
            assert found is not None
            assert not found.explained
            assert found.what == "replay draft"
            planted += 1
    assert planted > 10


def test_a_replay_by_another_drafter_is_convicted(tmp_path):
    target, drafter = pair(tmp_path, "float32")
    other = copy.deepcopy(drafter)
    with torch.no_grad():
        other.norm.weight.copy_(-other.norm.weight)
    auditor = Auditor(target, drafter, SETTINGS, PROMPTS)
    convicted = 0
    for trajectory, looped, _ in both_ways(target, drafter):
        layer_ids = drafter.config.target_layer_ids
        ((_, states),) = next(iter(FeatureStore().each(target, [trajectory], layer_ids)))
        lengths = replay_trajectory(other, target, trajectory, SETTINGS, states).counts
        found = auditor.compare_rounds(trajectory, *looped, lengths.round_lengths)
        if lengths.round_lengths != tuple(looped[1]):
            assert found is not None
            assert not found.explained
            convicted += 1
    assert convicted


def test_logits_of_replay_are_made_again_to_the_bit(tmp_path):
    target, drafter = pair(tmp_path, "bfloat16")
    trajectories = generate_trajectories(target, PROMPTS, SETTINGS, progress=False)
    auditor = Auditor(target, drafter, SETTINGS, PROMPTS)
    for batch in FeatureStore().each(target, trajectories, drafter.config.target_layer_ids):
        for index, states in batch[:3]:
            trajectory = trajectories[index]
            slots = replay_slots(
                drafter,
                target.embed,
                target.head,
                states,
                torch.tensor(trajectory.tokens),
                len(trajectory.prompt.ids),
                sampling=SETTINGS.sampling,
                anchors_per_chunk=128,
            )
            for anchor in range(0, len(slots.drafts), 5):
                again = auditor._replayed_draft(trajectory, anchor, trajectories)
                assert again.argmax(-1).tolist() == slots.drafts[anchor].tolist()
    for trajectory in trajectories[:4]:
        for position in range(0, len(trajectory.ids), 7):
            logits_V = auditor._generated_logits(trajectory.prompt, position)
            assert int(logits_V.argmax()) == trajectory.ids[position]


def both_ways(target, drafter):
    trajectories = generate_trajectories(target, PROMPTS, SETTINGS, progress=False)
    layer_ids = drafter.config.target_layer_ids
    batches = FeatureStore().each(target, trajectories, layer_ids)
    states = dict(item for batch in batches for item in batch)
    for place, trajectory in enumerate(trajectories):
        prompt = trajectory.prompt
        spec = decode_prompt(drafter, target, prompt.ids, SETTINGS, key=prompt.key)
        replayed = replay_trajectory(drafter, target, trajectory, SETTINGS, states[place])
        yield trajectory, (spec.ids, spec.round_lengths), replayed.counts.round_lengths


def test_the_bound_is_twice_the_largest_error_of_the_two_logits():
    reference = torch.tensor([1.0, 1.25, 9.0])
    near = [torch.tensor([1.125, 1.25, 9.0]), torch.tensor([1.0, 1.25, 0.0])]
    gap, bound, _, _ = explain((0, 1), near, reference)
    assert (gap, bound) == (0.25, 0.25)


def test_both_conditions_are_needed():
    reference = torch.tensor([1.0, 1.25, 9.0, 3.0])

    def judge(first, second):
        return explain(
            (0, 1), [reference + torch.tensor(first), reference + torch.tensor(second)], reference
        )[-1]

    assert judge([0.125, 0.0, 0.1, 0.0], [0.0, 0.1, 0.0, 0.1])
    assert not judge([0.06, 0.0, 0.1, 0.0], [0.0, 0.06, 0.0, 0.1])  # the gap is too wide
    assert not judge([9.0, 0.0, 0.1, 0.0], [0.0, 0.1, 0.0, 0.1])  # a pass that is plainly wrong
    assert judge([0.0] * 4, [0.0] * 4) is False  # no error explains no gap


def test_tokens_outside_a_reduced_vocabulary_have_no_noise():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    whole[4] = whole[1]  # a tie
    kept = torch.tensor([1, 4, 7])
    head = ReducedHead.of(FrozenHead(whole), kept)
    states = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    near, reference = states[0] + 1e-3 * states[1:], states[0]
    found = explain((1, 4), list(head.logits(near)), head.logits(reference))
    assert found[-1] is True
    rows = head.rows
    assert found == explain((0, 1), list(rows.logits(near)), rows.logits(reference))
    wrong = head.logits(torch.stack((near[0], states[1])))
    assert explain((1, 4), list(wrong), head.logits(reference))[-1] is False


@pytest.mark.parametrize(
    ("a", "b", "expected"), [([1, 2], [1, 2], None), ([1], [1, 2], 1), ([3], [4], 0)]
)
def test_first_difference(a, b, expected):
    assert first_difference(a, b) == expected


def test_settings_of_an_audit_are_greedy(tmp_path):
    target, drafter = pair(tmp_path, "float32")
    with pytest.raises(AssertionError):
        Auditor(
            target, drafter, replace(SETTINGS, sampling=replace(SETTINGS.sampling, temperature=1.0))
        )
