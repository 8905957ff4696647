"""Prompt lookup: the search against a slow twin, and the loop's text against the target's own."""

from __future__ import annotations

import numpy as np
import pytest

from drafter.evaluation.measure import decode_alone, decode_by_lookup
from drafter.evaluation.trajectories import TrajectorySettings
from drafter.prompt_lookup import NGramIndex
from drafter.sampling import Sampling
from tests.tiny import tiny_target


def slow_look_up(tokens, most, longest):
    """All places of the longest n-gram, by comparing slices; the best of their continuations."""
    for length in range(longest, 0, -1):
        follow = [
            tokens[start + length : start + length + most]
            for start in range(len(tokens) - length)
            if tokens[start : start + length] == tokens[len(tokens) - length :]
        ]
        if follow:
            full = [draft for draft in follow if len(draft) == most]
            return full[-1] if full else max(follow, key=len)
    return []


def test_the_longest_match_is_continued_as_far_as_can_be():
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        tokens = generator.integers(0, 4, size=generator.integers(1, 14)).tolist()
        index = NGramIndex(3)
        for cut in np.array_split(np.array(tokens), 3):  # the context grows as in decoding
            index.extend(cut.tolist())
        expected = slow_look_up(tokens, 5, 3)
        assert index.look_up(5) == expected
        found += bool(expected)
    assert found > 200


def test_a_loop_is_drafted_in_full():
    for tokens in ([9] + [5] * 30, [1, 2, 3, 4] * 10):
        index = NGramIndex()
        index.extend(tokens)
        assert len(index.look_up(15)) == 15


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
    """Three tokens of many draws against the target alone: total variation is noise."""
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
