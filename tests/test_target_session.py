"""Guards cache positions and crops after rejected drafts (C6, C7), sliding windows included.

Slow twin: the model's own logits of the whole text, without any cache.
"""

from __future__ import annotations

import pytest
import torch

from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import HIDDEN_SIZE, SLIDING_WINDOW, tiny_config, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3"]
TAPS = (0, 2)


def in_memory(family, **overrides):
    model = tiny_model(tiny_config(family, **overrides))
    return Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.fixture(scope="module", params=FAMILIES)
def target(request):
    return in_memory(request.param)


def tokens(count, seed=0):
    return torch.randint(0, 200, (count,), generator=torch.Generator().manual_seed(seed))


def uncached(target, ids):
    """(n, V) logits and (n, L*D) taps of the whole text."""
    with torch.no_grad():
        out = target.model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
    return out.logits[0], torch.cat([out.hidden_states[i + 1][0] for i in TAPS], -1)


def assert_equal(target, states, expected, where):
    logits = target.head.logits(states[0])
    torch.testing.assert_close(logits, expected[0][where], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[1], expected[1][where], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 1, 8, 8, 1, 20, 15], [15, 2, 43], [16, 44]])
def test_pieces_of_any_size_equal_the_whole_pass(target, pieces):
    ids = tokens(60)
    expected = uncached(target, ids)
    session, start = target.session(), 0
    for piece in pieces:
        states = session.forward(ids[start : start + piece], TAPS)
        assert states[0].shape == (piece, HIDDEN_SIZE)
        assert_equal(target, states, expected, slice(start, start + piece))
        start += piece
        assert session.length == start


def test_rejected_drafts_leave_no_trace_also_across_the_window_s_edge(target):
    # blocks of 8, of which 1 to 8 tokens stay, from well before the window's edge to far past it
    text, position = tokens(80), 5
    expected = uncached(target, text)
    session = target.session()
    session.forward(text[:position], TAPS)
    kept = [1, 8, 3, 1, 2, 7, 5, 1, 1, 8, 4, 6, 2]
    assert position < SLIDING_WINDOW < position + sum(kept) - 30
    for step, count in enumerate(kept):
        block = torch.cat((text[position : position + count], tokens(8 - count, seed=step + 1)))
        states = session.forward(block, TAPS)
        here = slice(position, position + count)
        assert_equal(target, [part[:count] for part in states], expected, here)
        position += count
        session.crop(position)
        assert session.length == position
        assert {layer.keys.shape[-2] for layer in session._cache.layers} == {position}
    assert_equal(target, session.forward(text[position:], TAPS), expected, slice(position, None))


def test_a_long_crop_past_the_window_brings_the_old_tokens_back(target):
    text = tokens(50)
    session = target.session()
    session.forward(text, ())
    session.crop(10)
    other = torch.cat((text[:10], tokens(30, seed=9)))
    states = session.forward(other[10:], TAPS)
    assert_equal(target, states, uncached(target, other), slice(10, None))


def test_cropping_to_the_present_length_does_nothing_and_longer_is_refused(target):
    session = target.session()
    session.forward(tokens(5), ())
    session.crop(5)
    assert session.length == 5
    for length in (6, 0, -1):
        with pytest.raises(AssertionError):
            session.crop(length)


def test_sessions_are_independent_of_each_other(target):
    one, other = tokens(30, seed=1), tokens(30, seed=2)
    first, second = target.session(), target.session()
    first.forward(one[:20], ())
    second.forward(other[:11], ())
    assert_equal(target, first.forward(one[20:], TAPS), uncached(target, one), slice(20, None))
    assert_equal(target, second.forward(other[11:], TAPS), uncached(target, other), slice(11, None))


def test_a_session_begun_in_inference_mode_goes_on_outside_of_it(target):
    text = tokens(20)
    session = target.session()
    with torch.inference_mode():
        session.forward(text[:10], ())
    session.crop(8)
    states = session.forward(text[8:], TAPS)
    assert not states[0].is_inference()
    assert_equal(target, states, uncached(target, text), slice(8, None))


def test_the_window_matters_in_these_tests():
    # were the window ignored, the tests above would prove nothing about it
    narrow, wide = in_memory("gemma3"), in_memory("gemma3", sliding_window=4096)
    logits = [uncached(target, tokens(40))[0] for target in (narrow, wide)]
    torch.testing.assert_close(logits[0][:SLIDING_WINDOW], logits[1][:SLIDING_WINDOW])
    assert (logits[0][SLIDING_WINDOW + 1] - logits[1][SLIDING_WINDOW + 1]).abs().max() > 1e-2
