"""What engines ask of the weights in a drafter's folder: names, shapes, dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from drafter.borrowed import BORROWED, read_tensor
from drafter.draft_vocabulary import from_maps
from drafter.errors import UserError
from drafter.export_rules import FILE_DTYPES, Finding, Said, rule
from drafter.speculators_layout import D2T, T2D


def expected_shapes(said: Said) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that the config asks for (method.md, last section)."""
    layers = said.layers
    width, inner, head_dim = (
        layers[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    query = layers["num_attention_heads"] * head_dim
    shared = layers["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, len(said.target_layer_ids) * width),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
    }
    projections = {
        "q_proj": (query, width),
        "k_proj": (shared, width),
        "v_proj": (shared, width),
        "o_proj": (width, query),
    }
    for i in range(layers["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        for name, shape in projections.items():
            own[f"self_attn.{name}.weight"] = shape
            if layers.get("attention_bias"):
                own[f"self_attn.{name}.bias"] = shape[:1]
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    if said.draft_vocab_size is not None:
        shapes["lm_head.weight"] = (said.draft_vocab_size, width)
        shapes[D2T], shapes[T2D] = (said.draft_vocab_size,), (layers["vocab_size"],)
    return shapes


def tensor_rules(said: Said, files: Mapping[str, Path], speculators: bool) -> list[Finding]:
    """Returns every rule for the weights, kept or not.

    Args:
        said: By config.json; its sizes and layer ids are whole numbers.
        files: Tensor to file.
        speculators: Older files of that layout hold the target's tensors; its loader replaces them.
    """
    if D2T in files and speculators and said.draft_vocab_size is None:  # as many as there are
        said = replace(said, draft_vocab_size=said.layers["vocab_size"])
    shapes = expected_shapes(said)
    borrowed = sorted(name for name in files if name in BORROWED and name not in shapes)
    own = {name: file for name, file in files.items() if name not in borrowed}
    findings = [
        rule(
            "no embedding and no head: both are the target's",
            not borrowed,
            f"the file has {', '.join(borrowed)}",
            "leave it out: the engine has the target's",
        )
    ]
    if speculators and borrowed:
        findings = [Finding(f"{', '.join(borrowed)}: read, then replaced by the target's")]
    missing, unknown = sorted(shapes.keys() - own.keys()), sorted(own.keys() - shapes.keys())
    wrong, dtypes, infinite = [], set(), []
    for name, file in own.items():
        with safe_open(file, "pt") as content:
            part = content.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if name not in (D2T, T2D):
            dtypes.add(dtype)
        if name in shapes and shape != shapes[name]:
            wrong.append(f"{name} is {shape}, not {shapes[name]}")
        if dtype in FILE_DTYPES.values() and not bool(read_tensor(file, name).isfinite().all()):
            infinite.append(name)
    anew = "export it anew from the run"
    return [
        *findings,
        rule("all tensors are there", not missing, f"{', '.join(missing)} missing", anew),
        rule("no others are", not unknown, f"{', '.join(unknown)} unknown", "leave them out"),
        rule("shapes fit the config", not wrong, "; ".join(wrong), anew),
        rule(
            "the file's dtype is the config's",
            dtypes == {FILE_DTYPES.get(str(said.dtype))},
            f"it is {', '.join(sorted(dtypes))}, not {said.dtype}",
            "write the file's dtype into config.json",
        ),
        rule("weights are finite", not infinite, f"{', '.join(infinite)} are not", anew),
        *([_map_rule(said, own)] if D2T in shapes and {D2T, T2D} <= own.keys() else []),
    ]


def _map_rule(said: Said, files: Mapping[str, Path]) -> Finding:
    name = "d2t and t2d name the same tokens, each once"
    d2t, t2d = (read_tensor(files[which], which) for which in (D2T, T2D))
    try:
        from_maps(d2t, t2d, said.draft_vocab_size, said.layers["vocab_size"], "the file")
    except UserError as error:
        return Finding(name, str(error).rstrip("."), "export it anew from the run")
    return Finding(name)
