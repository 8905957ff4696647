"""How a new drafter starts: from noise, from the target's final norm, or from its layers.

Legend: D hidden size, L tapped layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from drafter.errors import UserError
from drafter.model import Drafter

InitFromTarget = Literal["norm", "layers", "none"]

_COPIED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# where each of our norms is found in a target's layer; Gemma norms the attention's output too, and
# calls the one before the MLP pre_feedforward_layernorm
_NORMS = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("pre_feedforward_layernorm", "post_attention_layernorm"),
    "self_attn.q_norm": ("self_attn.q_norm",),
    "self_attn.k_norm": ("self_attn.k_norm",),
}


@torch.no_grad()
def initialise_from_target(
    drafter: Drafter, final_norm: nn.Module, target_layers: nn.ModuleList, how: InitFromTarget
) -> None:
    """Changes a freshly made drafter in place.

    Args:
        drafter: From `Drafter(config)`, weights drawn at `initializer_range`.
        final_norm: The target's norm before its head.
        target_layers: The target's decoder layers.
        how: `norm` copies the final norm: at 1 against a large tied embedding the first step had
            cross-entropy 19 and gradient norm 262 (method.md). `layers` also copies the target's
            last layers, and starts `fc` as the projection onto the last tap, normalised as the
            first copied layer would. `none` does nothing.

    Raises:
        UserError: `layers` with a target whose layers have other parts or shapes.
    """
    if how == "none":
        return
    drafter.norm.weight.copy_(effective_weight(final_norm, drafter.norm.weight))
    if how == "norm":
        return
    count = len(drafter.layers)
    if count > len(target_layers):
        raise UserError(
            f"init_from_target: layers needs {count} target layers, it has {len(target_layers)}; "
            "use fewer drafter layers, or init_from_target: norm."
        )
    sources = list(target_layers)[-count:]
    for index, (layer, source) in enumerate(zip(drafter.layers, sources, strict=True)):
        for name in _COPIED:
            _copy_linear(layer, source, name, index)
        for name, theirs in _NORMS.items():
            norm = next((found for n in theirs if (found := _find(source, n)) is not None), None)
            if norm is not None:
                weight = layer.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                _copy_norm(weight, norm, name, index)
    first_norm = _find(sources[0], "input_layernorm")
    if first_norm is not None:
        weight = drafter.hidden_norm.weight
        weight.copy_(effective_weight(first_norm, weight))
    width = drafter.config.hidden_size
    drafter.fc.weight.zero_()
    drafter.fc.weight[:, -width:].copy_(torch.eye(width))


def effective_weight(norm: nn.Module, like: Tensor) -> Tensor:
    """Returns a norm's scale (D,), also where the module stores it as 1 + w (Gemma).

    A vector of alternating signs has mean 0 and root mean square 1, so RMSNorm and LayerNorm both
    only scale it (and LayerNorm's bias cancels between it and its negative).
    """
    weight = next(norm.parameters())
    signs = torch.ones(like.shape[0], dtype=torch.float32, device=weight.device)
    signs[1::2] = -1.0
    probe = signs.to(weight.dtype).view(1, 1, 1, -1)
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)
    out = (norm(probe).float() - norm(-probe).float()).flatten() / 2
    scale: Tensor = out * signs * (1.0 + eps) ** 0.5
    return scale.to(like)


def _copy_norm(weight: Tensor, norm: nn.Module, name: str, index: int) -> None:
    width = next(norm.parameters()).shape[0]
    if width != weight.shape[0]:
        raise UserError(
            f"init_from_target: layers can't copy {name} into drafter layer {index}: the target's "
            f"has {width} entries, the drafter's {weight.shape[0]}; use init_from_target: norm."
        )
    weight.copy_(effective_weight(norm, weight))


def _find(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _copy_linear(layer: nn.Module, source: nn.Module, name: str, index: int) -> None:
    ours, theirs = layer.get_submodule(name), _find(source, name)
    weight = getattr(theirs, "weight", None)
    assert isinstance(ours, nn.Linear)
    if weight is None or weight.shape != ours.weight.shape:
        shape = None if weight is None else tuple(weight.shape)
        raise UserError(
            f"init_from_target: layers can't copy {name} into drafter layer {index}: the target "
            f"has {shape}, the drafter {tuple(ours.weight.shape)}; use init_from_target: norm."
        )
    if getattr(theirs, "bias", None) is not None:
        raise UserError(
            f"init_from_target: layers can't copy {name} into drafter layer {index}: the target's "
            "has a bias, the drafter's has none; use init_from_target: norm."
        )
    ours.weight.copy_(weight.to(ours.weight))
