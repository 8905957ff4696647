"""Prompt lookup: the search against a slow twin, and the loop's text against the target's own."""

from __future__ import annotations

import numpy as np
import pytest

from drafter.evaluation.measure import decode_alone, decode_by_lookup
from drafter.evaluation.trajectories import TrajectorySettings
from drafter.prompt_lookup import look_up
from drafter.sampling import Sampling
from tests.tiny import tiny_target


def slow_look_up(tokens, most, longest):
    """By string search over every length and place."""
    best = None
    for length in range(1, longest + 1):
        for start in range(len(tokens) - length):
            if length < len(tokens) and tokens[start : start + length] == tokens[-length:]:
                best = (length, start)
    if best is None:
        return []
    length, start = best
    return tokens[start + length : start + length + most]


def test_the_longest_latest_match_is_continued():
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        tokens = generator.integers(0, 4, size=generator.integers(1, 14)).tolist()
        expected = slow_look_up(tokens, 5, 3)
        assert look_up(tokens, 5, 3) == expected
        found += bool(expected)
    assert found > 200


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_its_text_is_the_targets_own(tmp_path, temperature):
    target = tiny_target(tmp_path)
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    settings = TrajectorySettings(24, Sampling(temperature), seed=4)
    decoded = decode_by_lookup(target, prompt, settings, 4)
    assert all(len(draft) <= 3 for draft in decoded.drafts)
    if temperature == 0:
        assert decoded.ids == decode_alone(target, prompt, settings).ids
    assert any(decoded.drafts)
    assert sum(decoded.round_lengths) == len(decoded.ids) - 1


def test_lookup_with_a_temperature_keeps_the_targets_law(tmp_path):
    """First two tokens of many draws against the target alone: total variation is noise."""
    target = tiny_target(tmp_path)
    prompt = [7, 8, 9, 7]
    sampling = Sampling(1.0, top_k=2)

    def law(decode):
        counts: dict[tuple[int, ...], int] = {}
        for seed in range(400):
            ids = tuple(decode(TrajectorySettings(3, sampling, seed)))
            counts[ids] = counts.get(ids, 0) + 1
        return counts

    ours = law(lambda settings: decode_by_lookup(target, prompt, settings, 4, key=1).ids)
    alone = law(lambda settings: decode_alone(target, prompt, settings, key=1).ids)
    gap = sum(abs(ours.get(k, 0) - alone.get(k, 0)) for k in ours | alone) / 800
    assert gap < 0.15
