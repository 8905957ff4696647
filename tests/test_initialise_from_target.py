"""Guards the start of a drafter from its target: norms as the target applies them, layers whole.

Gemma stores a norm's scale as 1 + w; copied as w, the first step would see states near zero.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drafter.config import DrafterConfig
from drafter.errors import UserError
from drafter.initialise import effective_weight, initialise_from_target
from drafter.model import Drafter
from tests.tiny import HIDDEN_SIZE, NUM_LAYERS, tiny_config, tiny_model

FAMILIES = ["llama", "qwen3", "gemma3"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def pair(family, num_layers=2, **overrides):
    """A target's decoder and a fresh drafter for it."""
    decoder = tiny_model(tiny_config(family)).get_decoder()
    config = DrafterConfig.for_target(
        decoder.config,
        block_size=4,
        num_layers=num_layers,
        target_layer_ids=(0, 2),
        mask_token_id=200,
    )
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(5)
    return decoder, Drafter(config)


def weights(drafter):
    return {name: tensor.clone() for name, tensor in drafter.state_dict().items()}


def states():
    return 3 * torch.randn(2, 7, HIDDEN_SIZE, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copied_norm_does_what_the_target_s_final_norm_does(family):
    decoder, drafter = pair(family)
    before = weights(drafter)
    initialise_from_target(drafter, decoder.norm, decoder.layers, "norm")
    torch.testing.assert_close(drafter.norm(states()), decoder.norm(states()))
    stored = decoder.norm.weight + 1 if family == "gemma3" else decoder.norm.weight
    torch.testing.assert_close(drafter.norm.weight, stored)
    changed = {n for n, tensor in weights(drafter).items() if not torch.equal(tensor, before[n])}
    assert changed == {"norm.weight"}


def test_none_changes_nothing():
    decoder, drafter = pair("llama")
    before = weights(drafter)
    initialise_from_target(drafter, decoder.norm, decoder.layers, "none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(drafter).items())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norm_s_epsilon_does_not_shrink_its_weight(family, eps):
    norm = tiny_model(tiny_config(family, rms_norm_eps=eps)).get_decoder().norm
    stored = norm.weight + 1 if family == "gemma3" else norm.weight
    torch.testing.assert_close(effective_weight(norm, torch.empty(HIDDEN_SIZE)), stored.detach())


def test_a_bf16_norm_gives_an_fp32_weight():
    norm = tiny_model(tiny_config("llama")).get_decoder().norm.bfloat16()
    weight = effective_weight(norm, torch.empty(HIDDEN_SIZE))
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, norm.weight.float(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("num_layers", [1, 2, NUM_LAYERS])
def test_layers_copies_the_last_layers_whole_and_in_order(family, num_layers):
    decoder, drafter = pair(family, num_layers)
    initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")
    for ours, theirs in zip(drafter.layers, decoder.layers[-num_layers:], strict=True):
        for name in PROJECTIONS:
            copied = getattr(ours.self_attn, name).weight
            assert torch.equal(copied, getattr(theirs.self_attn, name).weight), name
        for name in ("gate_proj", "up_proj", "down_proj"):
            copied = getattr(ours.mlp, name).weight
            assert torch.equal(copied, getattr(theirs.mlp, name).weight), name
        for name in ("input_layernorm", "post_attention_layernorm"):
            copied = getattr(ours, name).weight
            torch.testing.assert_close(copied, getattr(theirs, name).weight)
        for name in ("q_norm", "k_norm"):
            norm = getattr(theirs.self_attn, name, None)
            expected = torch.ones(8) if norm is None else norm.weight
            torch.testing.assert_close(getattr(ours.self_attn, name).weight, expected)
    torch.testing.assert_close(drafter.norm(states()), decoder.norm(states()))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_starts_the_context_as_the_normalised_last_tap(family):
    decoder, drafter = pair(family)
    initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")
    first, last = states(), states().flip(1)
    seen = drafter.hidden_norm(drafter.fc(torch.cat((first, last), -1)))
    torch.testing.assert_close(seen, decoder.layers[-2].input_layernorm(last))


def test_copies_are_not_shared_with_the_target_and_still_train():
    decoder, drafter = pair("llama")
    initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")
    assert all(p.requires_grad for p in drafter.parameters())
    ours, theirs = drafter.layers[-1].mlp.up_proj.weight, decoder.layers[-1].mlp.up_proj.weight
    with torch.no_grad():
        ours.add_(1.0)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("intermediate_size", 48, "mlp.gate_proj"),
        ("num_attention_heads", 2, "self_attn.q_proj"),
        ("num_key_value_heads", 1, "self_attn.k_proj"),
    ],
)
def test_layers_of_another_shape_are_refused_by_name(field, value, named):
    decoder, drafter = pair("llama", **{field: value})
    with pytest.raises(UserError, match=named):
        initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")


def test_a_fused_projection_is_refused_by_name():
    decoder, drafter = pair("llama")
    for layer in decoder.layers:
        layer.mlp.gate_up_proj = nn.Linear(HIDDEN_SIZE, 128, bias=False)
        del layer.mlp.gate_proj, layer.mlp.up_proj
    with pytest.raises(UserError, match="gate_proj"):
        initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")


def test_more_drafter_layers_than_the_target_has_are_refused():
    decoder, drafter = pair("llama", NUM_LAYERS + 1)
    with pytest.raises(UserError, match=f"needs {NUM_LAYERS + 1} target layers"):
        initialise_from_target(drafter, decoder.norm, decoder.layers, "layers")
