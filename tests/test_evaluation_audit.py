"""The audit: silent where texts agree, explains a near tie, and convicts a planted fault."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from drafter.decoding import CachedTarget
from drafter.evaluation.audit import Auditor, explain, first_difference
from drafter.evaluation.measure import (
    FeatureStore,
    decode_alone,
    decode_prompt,
    replay_trajectory,
)
from drafter.evaluation.trajectories import EvalPrompt, TrajectorySettings, generate_trajectories
from drafter.model import Drafter
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
    found = texts(target, drafter, Auditor(target, drafter, SETTINGS))
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
        assert auditor.compare_rounds(trajectory, looped[0], looped[1], replayed) is None


def test_replay_and_loop_part_only_at_explained_ties_in_bf16(tmp_path):
    target, drafter = pair(tmp_path, "bfloat16")
    auditor = Auditor(target, drafter, SETTINGS)
    for trajectory, looped, replayed in both_ways(target, drafter):
        found = auditor.compare_rounds(trajectory, looped[0], looped[1], replayed)
        assert found is None or found.explained


def test_a_replay_by_another_drafter_is_convicted(tmp_path):
    target, drafter = pair(tmp_path, "float32")
    other = copy.deepcopy(drafter)
    with torch.no_grad():
        other.norm.weight.copy_(-other.norm.weight)
    auditor = Auditor(target, drafter, SETTINGS)
    convicted = 0
    for trajectory, looped, _ in both_ways(target, drafter):
        layer_ids = drafter.config.target_layer_ids
        ((_, states),) = next(iter(FeatureStore().each(target, [trajectory], layer_ids)))
        replayed = replay_trajectory(other, target, trajectory, SETTINGS, states)
        lengths = replayed.counts.round_lengths
        found = auditor.compare_rounds(trajectory, looped[0], looped[1], lengths)
        if lengths != tuple(looped[1]):
            assert found is not None
            assert not found.explained
            convicted += 1
    assert convicted


def both_ways(target, drafter):
    for trajectory in generate_trajectories(target, PROMPTS, SETTINGS, progress=False):
        spec = decode_prompt(
            drafter, target, trajectory.prompt.ids, SETTINGS, key=trajectory.prompt.key
        )
        layer_ids = drafter.config.target_layer_ids
        ((_, states),) = next(iter(FeatureStore().each(target, [trajectory], layer_ids)))
        replayed = replay_trajectory(drafter, target, trajectory, SETTINGS, states)
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
