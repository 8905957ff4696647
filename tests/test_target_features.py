"""Guards the layer convention (A4), states before and after the norm (A6), batching (B7), packing.

Slow twin: one document at a time through transformers with `output_hidden_states`.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from drafter.errors import UserError
from drafter.target import (
    Target,
    assert_finite_features,
    check_layer_ids,
    default_layer_ids,
)
from drafter.target_loading import Loaded
from tests.tiny import HIDDEN_SIZE, NUM_LAYERS, tiny_config, tiny_model, tiny_target, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3"]
LENGTHS = (40, 7, 23, 1, 12, 33, 18, 29)  # Gemma's window is 16


def in_memory(family="llama", tied=True, seed=0, **overrides):
    model = tiny_model(tiny_config(family, tied, **overrides), seed)
    return Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.fixture(scope="module", params=FAMILIES)
def target(request):
    return in_memory(request.param)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 200, (length,), generator=generator) for length in LENGTHS]


def padded(documents, length=None, pad=3):
    length = length or max(len(d) for d in documents)
    ids = torch.full((len(documents), length), pad)
    document_ids = torch.full_like(ids, -1)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
        document_ids[row, : len(document)] = 0
    return ids, document_ids


def twin(target, document, layer_ids):
    with torch.no_grad():
        out = target.model(input_ids=document[None], output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[i + 1][0] for i in layer_ids], -1), out


def assert_rows_equal(features, documents, expected, order=None):
    for row, i in enumerate(order or range(len(documents))):
        states = features.hidden_states[row, : len(documents[i])]
        torch.testing.assert_close(states, expected[i], atol=1e-4, rtol=1e-4)
        assert not features.hidden_states[row, len(documents[i]) :].any()


def test_layer_i_is_transformers_hidden_states_i_plus_1(target, documents):
    for layer_ids in ([0], [0, 1, 2], [2, 0]):
        ids, document_ids = padded(documents[:1])
        features = target.features(ids, document_ids, layer_ids)
        assert features.hidden_states.shape == (1, LENGTHS[0], len(layer_ids) * HIDDEN_SIZE)
        assert features.last_hidden is None
        expected, _ = twin(target, documents[0], layer_ids)
        torch.testing.assert_close(features.hidden_states[0], expected)


def test_layers_that_add_constants_give_their_sums_in_the_order_asked_for():
    target = in_memory()
    with torch.no_grad():
        target.model.get_input_embeddings().weight.zero_()
        for layer in target.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for i, layer in enumerate(target.layers):
        layer.register_forward_hook(lambda module, arguments, output, i=i: output + (i + 1))
    ids = torch.zeros(1, 5, dtype=torch.long)
    states = target.features(ids, ids, [0, 2]).hidden_states
    assert states[..., :HIDDEN_SIZE].unique().tolist() == [1.0]
    assert states[..., HIDDEN_SIZE:].unique().tolist() == [6.0]
    states = target.features(ids, ids, [2, 0]).hidden_states
    assert states[..., :HIDDEN_SIZE].unique().tolist() == [6.0]


@pytest.mark.parametrize("output_is_tuple", [True, False])
def test_layer_outputs_may_be_tuples(output_is_tuple, documents):
    target = in_memory()
    ids, document_ids = padded(documents[:1])
    expected = target.features(ids, document_ids, [1]).hidden_states

    class TupleLayer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return (self.layer(*args, **kwargs),)

    class FirstOfTuple(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, *args, **kwargs):
            if isinstance(hidden_states, tuple):
                hidden_states = hidden_states[0]
            return self.layer(hidden_states, *args, **kwargs)

    if output_is_tuple:
        target.layers[1] = TupleLayer(target.layers[1])
        target.layers[2] = FirstOfTuple(target.layers[2])
    assert torch.equal(target.features(ids, document_ids, [1]).hidden_states, expected)


def test_last_hidden_is_after_the_final_norm_and_gives_the_model_s_logits(target, documents):
    ids, document_ids = padded(documents)
    features = target.features(ids, document_ids, [1], last_hidden=True)
    assert features.last_hidden is not None
    for row, document in enumerate(documents):
        _, out = twin(target, document, [1])
        logits = target.head.logits(features.last_hidden[row, : len(document)])
        assert (logits - out.logits[0]).abs().max() < 1e-4
        assert torch.equal(logits.argmax(-1), out.logits[0].argmax(-1))
        assert not features.last_hidden[row, len(document) :].any()


def test_stopping_after_the_last_tap_changes_nothing_and_runs_no_later_layer(target, documents):
    ids, document_ids = padded(documents)
    ran = []
    before = [len(layer._forward_hooks) for layer in target.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, arguments, i=i: ran.append(i))
        for i, layer in enumerate(target.layers)
    ]
    whole = target.features(ids, document_ids, [0, 1], last_hidden=True)
    part = target.features(ids, document_ids, [0, 1])
    for hook in hooks:
        hook.remove()
    assert ran == [*range(NUM_LAYERS), 0, 1]
    assert torch.equal(whole.hidden_states, part.hidden_states)
    after = [len(layer._forward_hooks) for layer in target.layers]
    assert after == before, "a hook was left behind"


def test_batches_of_any_size_and_order_give_each_document_its_own_states(target, documents):
    layer_ids = [0, 2]
    expected = [twin(target, document, layer_ids)[0] for document in documents]
    everything = range(len(documents))
    for order in ([0], [*everything], [5, 1, 7, 0, 3, 2, 6, 4], [1, 1, 0, 1]):
        ids, document_ids = padded([documents[i] for i in order])
        for _ in range(2):
            features = target.features(ids, document_ids, layer_ids)
            assert_rows_equal(features, documents, expected, order)


def test_padding_is_never_looked_up_and_never_looked_at(target, documents):
    ids, document_ids = padded(documents[1:3])
    expected = target.features(ids, document_ids, [0, 2]).hidden_states
    for pad in (0, 199, -100, 10_000):
        ids, document_ids = padded(documents[1:3], length=30, pad=pad)
        states = target.features(ids, document_ids, [0, 2]).hidden_states
        torch.testing.assert_close(states[:, : expected.shape[1]], expected)


def test_packed_documents_never_see_each_other(target, documents):
    layer_ids = [0, 2]
    rows = [[0, 1, 4], [3, 2], [6, 3, 3, 7]]  # documents of each row, side by side
    length = max(sum(LENGTHS[i] for i in row) for row in rows) + 3
    ids = torch.full((len(rows), length), 3)
    document_ids = torch.full_like(ids, -1)
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            ids[row, start : start + LENGTHS[i]] = documents[i]
            document_ids[row, start : start + LENGTHS[i]] = number
            start += LENGTHS[i]
    features = target.features(ids, document_ids, layer_ids, last_hidden=True)
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            expected, out = twin(target, documents[i], layer_ids)
            here = slice(start, start + LENGTHS[i])
            states = features.hidden_states[row, here]
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
            last = features.last_hidden[row, here]
            expected = out.hidden_states[-1][0]
            torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)
            start += LENGTHS[i]
        assert not features.hidden_states[row, start:].any()


@pytest.mark.parametrize("number", [0, 4])
def test_a_document_in_the_middle_of_its_row_and_an_empty_row_are_fine(target, documents, number):
    ids = torch.full((2, 30), 3)
    document_ids = torch.full_like(ids, -1)
    ids[0, 5:28], document_ids[0, 5:28] = documents[2], number
    states = target.features(ids, document_ids, [1]).hidden_states
    expected, _ = twin(target, documents[2], [1])
    torch.testing.assert_close(states[0, 5:28], expected, atol=1e-4, rtol=1e-4)
    states[0, 5:28] = 0
    assert not states.any()
    assert not target.features(ids, torch.full_like(ids, -1), [1]).hidden_states.any()


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_features_can_be_inputs_of_a_backward_pass_wherever_they_were_made(grad_mode, documents):
    target = in_memory()
    with grad_mode():
        ids, document_ids = padded(documents)
        features = target.features(ids, document_ids, [0, 1], last_hidden=True)
        embedded = target.embed(ids)
    weight = torch.ones(2 * HIDDEN_SIZE, requires_grad=True)
    last = torch.ones(HIDDEN_SIZE, requires_grad=True)
    for tensor in (*features, embedded):
        assert not tensor.requires_grad
    loss = (features.hidden_states * weight).sum() + (
        (features.last_hidden + embedded) * last
    ).sum()
    loss.backward()
    assert weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())


def test_autocast_leaves_the_target_s_precision_alone(documents):
    target = in_memory()
    ids, document_ids = padded(documents)
    expected = target.features(ids, document_ids, [1], last_hidden=True)
    with torch.autocast("cpu", torch.bfloat16):
        features = target.features(ids, document_ids, [1], last_hidden=True)
    assert torch.equal(features.hidden_states, expected.hidden_states)
    assert torch.equal(features.last_hidden, expected.last_hidden)


def test_a_module_that_borrows_the_target_does_not_own_it():
    target = in_memory()

    class Borrower(LightningModule):
        def __init__(self):
            super().__init__()
            self.target = target
            self.weight = nn.Parameter(torch.zeros(1))

    borrower = Borrower()
    borrower.train()
    assert not isinstance(target, nn.Module)
    target = Target(Loaded(target.model.train(), tiny_tokenizer()), "in memory", None)
    assert [name for name, _ in borrower.named_parameters()] == ["weight"]
    assert list(borrower.state_dict()) == ["weight"]
    assert not target.model.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_embed_is_what_the_first_layer_reads(family, tied, documents):
    target = in_memory(family, tied)
    read = []
    hook = target.layers[0].register_forward_pre_hook(
        lambda module, arguments: read.append(arguments[0])
    )
    target.features(documents[0][None], torch.zeros(1, LENGTHS[0], dtype=torch.long), [0])
    hook.remove()
    embedded = target.embed(documents[0])
    assert torch.equal(embedded, read[0][0])
    table = target.model.get_input_embeddings().weight[documents[0]]
    scale = HIDDEN_SIZE**0.5 if family == "gemma3" else 1.0
    torch.testing.assert_close(embedded, table * scale)


def test_loaded_targets_have_the_dtype_asked_for(tmp_path, documents):
    for dtype in ("float32", "bfloat16", "float64"):
        target = Target.load(tiny_target(tmp_path, "gemma3").path, dtype=dtype)
        ids, document_ids = padded(documents[:2])
        features = target.features(ids, document_ids, [0], last_hidden=True)
        wanted = getattr(torch, dtype)
        assert {target.dtype, target.embed(ids).dtype} == {wanted}
        assert {features.hidden_states.dtype, features.last_hidden.dtype} == {wanted}


def test_layer_ids_out_of_range_are_named_with_the_valid_range():
    for bad in ([0, 4], [-1], [3], [0, 17]):
        with pytest.raises(UserError, match=rf"{max(bad, key=abs)}.*0 to 2"):
            check_layer_ids(bad, 4)
    with pytest.raises(UserError, match="twice"):
        check_layer_ids([0, 1, 0], 4)
    with pytest.raises(UserError, match="empty"):
        check_layer_ids([], 4)
    check_layer_ids([2, 0, 1], 4)


def test_default_layer_ids_follow_the_method():
    assert default_layer_ids(36, 5) == [1, 9, 17, 25, 33]
    assert default_layer_ids(30, 5) == [1, 8, 14, 20, 27]  # 7.5 and 20.5: half to even
    assert default_layer_ids(32, 1) == [16]
    assert default_layer_ids(4, 5) == [1]
    for num_layers in range(2, 40):
        for count in range(1, 8):
            ids = default_layer_ids(num_layers, count)
            assert 1 <= len(ids) <= count
            check_layer_ids(ids, num_layers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_named_by_row_layer_and_position(bad):
    states = torch.zeros(3, 9, 2 * HIDDEN_SIZE)
    assert_finite_features(states, [4, 7], torch.tensor([10, 11, 12]))
    states[1, 6, HIDDEN_SIZE + 4] = bad
    with pytest.raises(UserError, match="row 11, layer 7, position 6"):
        assert_finite_features(states, [4, 7], torch.tensor([10, 11, 12]))
    with pytest.raises(UserError, match="row 1, layer 7, position 6"):
        assert_finite_features(states, [4, 7])
