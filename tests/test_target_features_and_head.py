"""Guards features, head, embedding and session of targets read from disk, tied and untied.

Slow twin: the model's own forward pass, one unpadded document at a time, without a cache.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

from drafter.errors import UserError
from drafter.target import Target, assert_finite_features, check_layer_ids, default_layer_ids
from drafter.target_loading import Loaded
from tests.tiny import HIDDEN_SIZE, SLIDING_WINDOW, tiny_config, tiny_model, tiny_target
from tests.tiny import tiny_tokenizer as tokenizer_of

KINDS = [(family, tied) for family in ("llama", "qwen3", "gemma3") for tied in (True, False)]
LENGTHS = (5, 37, 1, 20, 11, 29, 16, 17)
TAPS = [0, 2]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def target(request, tmp_path_factory):
    family, tied = request.param
    return tiny_target(tmp_path_factory.mktemp("target"), family, tied, seed=3)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 200, (length,), generator=generator) for length in LENGTHS]


def in_memory(config):
    return Target(Loaded(tiny_model(config), tokenizer_of()), "in memory", None)


def own(target, ids):
    """The model's own pass over one document."""
    with torch.no_grad():
        return target.model(input_ids=ids[None], output_hidden_states=True, use_cache=False)


def side_by_side(out, layer_ids):
    return torch.cat([out.hidden_states[i + 1][0] for i in layer_ids], -1)


def batch_of(documents):
    ids = torch.full((len(documents), max(map(len, documents))), 9)
    document_ids = torch.full_like(ids, -1)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
        document_ids[row, : len(document)] = 0
    return ids, document_ids


# ---------------------------------------------------------------- states


def test_taps_are_the_outputs_of_the_layers_named_and_not_their_neighbours(target, documents):
    for document in documents[:4]:
        out = own(target, document)
        for layer_ids in ([0], [1], [2], [0, 2], [2, 1, 0]):
            states = target.features(document[None], torch.zeros(1, len(document)), layer_ids)
            expected = side_by_side(out, layer_ids)
            torch.testing.assert_close(states.hidden_states[0], expected, **TOLERANCE)
            assert states.last_hidden is None


def test_layers_that_add_i_plus_1_give_running_sums():
    target = in_memory(tiny_config("llama"))
    with torch.no_grad():
        target.model.get_input_embeddings().weight.zero_()
    for i, layer in enumerate(target.layers):
        layer.forward = lambda hidden_states, *_, i=i, **__: hidden_states + (i + 1)
    ids = torch.arange(6)[None]
    states = target.features(ids, torch.zeros_like(ids), TAPS).hidden_states
    assert (states[..., :HIDDEN_SIZE] == 1).all()
    assert (states[..., HIDDEN_SIZE:] == 6).all()


def test_company_and_order_in_a_batch_change_no_state(target, documents):
    together = target.features(*batch_of(documents), TAPS, last_hidden=True)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = target.features(*batch_of([documents[i] for i in order]), TAPS, last_hidden=True)
    for row, document in enumerate(documents):
        alone = target.features(*batch_of([document]), TAPS, last_hidden=True)
        for states, among, moved in zip(alone, together, shuffled, strict=True):
            torch.testing.assert_close(among[row, : len(document)], states[0], **TOLERANCE)
            there = moved[order.index(row), : len(document)]
            torch.testing.assert_close(there, states[0], **TOLERANCE)
            assert not among[row, len(document) :].any()


def test_packed_rows_equal_separate_rows_and_padding_is_zero(target, documents):
    rows = [documents[:3], documents[3:6], documents[6:]]
    length = 2 + max(sum(map(len, row)) for row in rows)
    ids, document_ids = torch.full((3, length), 9), torch.full((3, length), -1)
    for r, row in enumerate(rows):
        text = torch.cat(row)
        ids[r, : len(text)] = text
        numbers = torch.arange(len(row)).repeat_interleave(torch.tensor([len(d) for d in row]))
        document_ids[r, : len(text)] = numbers
    packed = target.features(ids, document_ids, TAPS, last_hidden=True)
    for r, row in enumerate(rows):
        outs = [own(target, document) for document in row]
        expected = torch.cat([side_by_side(out, TAPS) for out in outs])
        last = torch.cat([out.hidden_states[-1][0] for out in outs])
        torch.testing.assert_close(packed.hidden_states[r, : len(last)], expected, **TOLERANCE)
        torch.testing.assert_close(packed.last_hidden[r, : len(last)], last, **TOLERANCE)
        assert not packed.hidden_states[r, len(last) :].any()
        assert not packed.last_hidden[r, len(last) :].any()


def test_features_train_what_reads_them_and_never_the_target(target, documents):
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    reader = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
    with torch.inference_mode():  # where Lightning validates
        made = target.features(*batch_of(documents[:2]), [1], last_hidden=True)
        embedded = target.embed(documents[0])
    for states in (*made, embedded):
        assert not states.is_inference()
        assert not states.requires_grad
    target.head.logits(reader(made.hidden_states)).square().mean().backward()
    assert reader.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in target.model.parameters())


# ---------------------------------------------------------------- head and embedding


def test_the_head_of_the_last_hidden_state_gives_the_model_s_logits(target, documents):
    states = target.features(*batch_of(documents), [0], last_hidden=True).last_hidden
    for row, document in enumerate(documents):
        logits = target.head.logits(states[row, : len(document)])
        torch.testing.assert_close(logits, own(target, document).logits[0], **TOLERANCE)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(target):
    table = target.model.get_input_embeddings().weight
    assert torch.equal(target.head.weight, table) == target.config.tie_word_embeddings


def test_embed_is_what_the_first_layer_reads_and_gemma_scales_it(target, documents):
    ids = documents[1]
    torch.testing.assert_close(target.embed(ids), own(target, ids).hidden_states[0][0])
    table = nn.functional.embedding(ids, target.model.get_input_embeddings().weight)
    factor = HIDDEN_SIZE**0.5 if target.config.model_type.startswith("gemma") else 1.0
    torch.testing.assert_close(target.embed(ids), table * factor)


@pytest.mark.parametrize(
    ("config_class", "extra"),
    [
        (Gemma2Config, {"final_logit_softcapping": 2.0}),
        (GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        (GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
        (CohereConfig, {"logit_scale": 0.0625}),
        (PhiConfig, {}),
    ],
)
def test_no_family_s_logits_or_embeddings_are_silently_wrong(config_class, extra, documents):
    config = config_class(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=3, **extra,
    )  # fmt: skip
    model = tiny_model(config)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    target = Target(Loaded(model, tokenizer_of()), "in memory", None)
    ids = documents[1]
    out = own(target, ids)
    states = target.features(ids[None], torch.zeros(1, len(ids)), [0], last_hidden=True)
    torch.testing.assert_close(target.head.logits(states.last_hidden), out.logits, **TOLERANCE)
    torch.testing.assert_close(target.embed(ids), out.hidden_states[0][0], **TOLERANCE)
    plain = states.last_hidden @ target.head.weight.T
    assert not torch.allclose(plain, out.logits, atol=1e-2), "the case must need its transformation"


# ---------------------------------------------------------------- session


def test_crop_then_continue_equals_an_uncached_pass_across_the_window_s_edge(target):
    generator = torch.Generator().manual_seed(7)
    kept = torch.empty(0, dtype=torch.long)
    session = target.session()
    # each step appends a block and keeps a part of it, as speculative decoding does
    for appended, keep in [(13, 13), (6, 1), (6, 4), (1, 1), (8, 3), (30, 2), (6, 6), (9, 9)]:
        block = torch.randint(0, 200, (appended,), generator=generator)
        last, taps = session.forward(block, TAPS)
        kept = torch.cat((kept, block))
        out = own(target, kept)
        expected = side_by_side(out, TAPS)[-appended:]
        torch.testing.assert_close(taps, expected, **TOLERANCE)
        torch.testing.assert_close(last, out.hidden_states[-1][0, -appended:], **TOLERANCE)
        kept = kept[: len(kept) - appended + keep]
        session.crop(len(kept))
        assert session.length == len(kept)
    assert len(kept) > 2 * SLIDING_WINDOW


# ---------------------------------------------------------------- ids and finiteness


@pytest.mark.parametrize(
    ("layer_ids", "match"),
    [([1, 5], "last"), ([6], "6 layers"), ([-1], "-1"), ([2, 2], "twice"), ([], "empty")],
)
def test_layer_ids_that_can_t_be_tapped_are_refused(layer_ids, match):
    with pytest.raises(UserError, match=match):
        check_layer_ids(layer_ids, 6)
    check_layer_ids([4, 0], 6)


def test_default_taps_of_any_target_can_be_tapped_and_are_as_many_as_fit():
    assert default_layer_ids(30, 5) == [1, 8, 14, 20, 27]
    for num_layers in range(2, 12):
        for count in (1, 2, 5):
            ids = default_layer_ids(num_layers, count)
            check_layer_ids(ids, num_layers)
            assert len(ids) == min(count, max(1, num_layers - 3))


def test_the_first_state_that_is_not_finite_is_named_by_row_layer_and_position(target, documents):
    states = target.features(*batch_of(documents), [0, 2]).hidden_states
    assert_finite_features(states, [0, 2])
    states[3, 4, HIDDEN_SIZE] = float("nan")
    with pytest.raises(UserError, match="row 3, layer 2, position 4"):
        assert_finite_features(states, [0, 2])
    with pytest.raises(UserError, match="row 77, layer 2, position 4"):
        assert_finite_features(states, [0, 2], torch.arange(74, 82))
