"""What engines ask of a drafter's folder, as rules that are kept or broken.

The rules are those of the public loaders, restated: vLLM's `DFlashDraftModel` and its reading of
speculators configs, SGLang's `DFlashDraftModel` and `parse_dflash_draft_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from drafter.borrowed import BORROWED, read_tensor, tensor_files
from drafter.config import MAX_BLOCK_SIZE
from drafter.errors import UserError
from drafter.speculators_layout import is_speculators, verifier_name

FILE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Finding:
    """One rule on one folder: kept where `fault` is empty."""

    rule: str
    fault: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Said:
    """What a config.json of either layout says, in one form.

    Attributes:
        layers: The flat Qwen3 fields.
        block_size: K as the layout tells it, wherever it stands.
        mask_token_id: Likewise.
        target_layer_ids: 0-based decoder layers; whatever stands there where it is no list of ints.
        num_target_layers: None where it is not told.
        dtype: Name of the weights' dtype.
    """

    layers: Mapping[str, Any]
    block_size: Any
    mask_token_id: Any
    target_layer_ids: Any
    num_target_layers: Any
    dtype: Any


def check_export(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    """Returns every rule for a folder, kept or not.

    Args:
        folder: With the weights.
        config: Content of its config.json.
    """
    speculators = is_speculators(config)
    said = said_by(config)
    findings = _speculators_rules(config, said) if speculators else _zlab_rules(config)
    findings += _common_rules(said)
    try:
        files = tensor_files(folder)
    except UserError as error:
        return [*findings, Finding("weights are safetensors", str(error), "export it anew")]
    return findings + _tensor_rules(said, files, speculators)


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
    return shapes


def said_by(config: Mapping[str, Any]) -> Said:
    """Returns what a config.json of either layout says."""
    return _from_speculators(config) if is_speculators(config) else _from_zlab(config)


def _from_zlab(config: Mapping[str, Any]) -> Said:
    dflash = _mapping(config.get("dflash_config"))
    return Said(
        config,
        dflash.get("block_size", config.get("block_size")),
        dflash.get("mask_token_id"),
        dflash.get("target_layer_ids"),
        config.get("num_target_layers"),
        config.get("dtype", config.get("torch_dtype")),
    )


def _from_speculators(config: Mapping[str, Any]) -> Said:
    ids = config.get("aux_hidden_state_layer_ids")
    return Said(
        _mapping(config.get("transformer_layer_config")),
        config.get("block_size"),
        config.get("mask_token_id"),
        [i - 1 for i in ids] if _is_ints(ids) else ids,
        config.get("num_target_layers"),
        config.get("dtype"),
    )


def _zlab_rules(config: Mapping[str, Any]) -> list[Finding]:
    dflash = _mapping(config.get("dflash_config"))
    sizes = {found["block_size"] for found in (config, dflash) if "block_size" in found}
    return [
        _equal(config, "architectures", ["DFlashDraftModel"]),
        _equal(config, "model_type", "qwen3"),
        _rule(
            "block_size stands once, or twice alike",
            len(sizes) == 1,
            f"it is {sorted(map(str, sizes)) or 'absent'}",
            "write it at the top level or in dflash_config",
        ),
    ]


def _speculators_rules(config: Mapping[str, Any], said: Said) -> list[Finding]:
    how = _mapping(config.get("speculators_config"))
    methods = how.get("proposal_methods")
    default = how.get("default_proposal_method")
    drafted = [
        one.get("speculative_tokens")
        for one in (methods if isinstance(methods, list) else [])
        if isinstance(one, dict) and one.get("proposal_type") == default
    ]
    wanted = said.block_size - 1 if _is_int(said.block_size) else None
    vocab_size = said.layers.get("vocab_size")
    return [
        _equal(config, "speculators_model_type", "dflash"),
        _equal(how, "algorithm", "dflash", "speculators_config."),
        _equal(said.layers, "model_type", "qwen3", "transformer_layer_config."),
        _rule(
            "speculators_config proposes K - 1 tokens by its default method",
            drafted == [wanted] and wanted is not None,
            f"{default!r} proposes {drafted or 'nothing'} for K = {said.block_size}",
            f"write speculative_tokens {wanted} into its proposal method",
        ),
        _rule(
            "speculators_config.verifier.name_or_path names the target",
            bool(verifier_name(config)),
            "it names none",
            "write the target's folder or hub name, or export with --verifier",
        ),
        _rule(
            "draft_vocab_size is the target's vocabulary",
            config.get("draft_vocab_size") == vocab_size,
            f"it is {config.get('draft_vocab_size')}, not {vocab_size}",
            f"write {vocab_size}",
        ),
        _rule(
            "sample_from_anchor is false",
            not config.get("sample_from_anchor"),
            "it is true, but the anchor's slot predicts nothing",
            "write false",
        ),
    ]


def _common_rules(said: Said) -> list[Finding]:
    layers, ids, most = said.layers, said.target_layer_ids, said.num_target_layers
    last = most - 2 if _is_int(most) and most > 1 else None
    rope = _mapping(layers.get("rope_parameters"))
    thetas = {
        float(found["rope_theta"])
        for found in (layers, rope)
        if isinstance(found.get("rope_theta"), int | float)
    }
    kinds, depth = layers.get("layer_types"), layers.get("num_hidden_layers")
    full = kinds is None or kinds == ["full_attention"] * (depth if _is_int(depth) else 0)
    absent = [key for key in SIZES if not _is_int(layers.get(key)) or layers[key] < 1]
    return [
        _rule(
            f"block_size is 2 to {MAX_BLOCK_SIZE}",
            _is_int(said.block_size) and 2 <= said.block_size <= MAX_BLOCK_SIZE,
            f"it is {said.block_size!r}",
            "write the K that it was trained with",
        ),
        _rule(
            "mask_token_id is a token of the vocabulary",
            _is_int(said.mask_token_id)
            and 0 <= said.mask_token_id < int(layers.get("vocab_size") or 0),
            f"it is {said.mask_token_id!r}, of {layers.get('vocab_size')} tokens",
            "write the id that it was trained with",
        ),
        _rule(
            "target layer ids are different layers, none of them the last",
            _is_ints(ids)
            and len(set(ids)) == len(ids) > 0
            and min(ids) >= 0
            and (last is None or max(ids) <= last),
            f"they are {ids!r} (0-based) of {most} layers",
            "write those that it was trained with (speculators writes each plus 1)",
        ),
        _rule(
            "sizes are whole numbers from 1",
            not absent,
            f"{', '.join(absent)}: {', '.join(repr(layers.get(key)) for key in absent)}",
            "write them",
        ),
        _equal(layers, "hidden_act", "silu"),
        _rule(
            "every layer has full attention",
            full and not layers.get("use_sliding_window"),
            f"layer_types is {kinds!r} for {depth} layers, "
            f"use_sliding_window {layers.get('use_sliding_window')!r}",
            "write full_attention once for each layer, and no sliding window",
        ),
        _rule(
            "rope_theta and rope_parameters say the same",
            len(thetas) == 1,
            f"theta is {sorted(thetas) or 'absent'}",
            "write the target's into both",
        ),
        _rule(
            f"dtype is one of {', '.join(FILE_DTYPES)}",
            said.dtype in FILE_DTYPES,
            f"it is {said.dtype!r}",
            "write that of the file",
        ),
    ]


def _tensor_rules(said: Said, files: Mapping[str, Path], speculators: bool) -> list[Finding]:
    borrowed = sorted(name for name in files if name in BORROWED)
    own = {name: file for name, file in files.items() if name not in borrowed}
    findings = [
        _rule(
            "no embedding and no head: both are the target's",
            not borrowed,
            f"the file has {', '.join(borrowed)}",
            "load it with load_drafter and export it anew",
        )
    ]
    if speculators and borrowed:  # the library's older files have them; its loader overwrites them
        findings = [Finding(f"{', '.join(borrowed)}: read, then replaced by the target's")]
    try:
        shapes = expected_shapes(said)
    except (KeyError, TypeError) as error:
        return [*findings, Finding("tensors fit the config", f"it lacks {error}", "mend that")]
    missing, unknown = sorted(shapes.keys() - own.keys()), sorted(own.keys() - shapes.keys())
    wrong, dtypes, infinite = [], set(), []
    for name, file in own.items():
        with safe_open(file, "pt") as content:
            part = content.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
        dtypes.add(dtype)
        if name in shapes and shape != shapes[name]:
            wrong.append(f"{name} is {shape}, not {shapes[name]}")
        if dtype in FILE_DTYPES.values() and not bool(read_tensor(file, name).isfinite().all()):
            infinite.append(name)
    anew = "export it anew from the run"
    return [
        *findings,
        _rule("all tensors are there", not missing, f"{', '.join(missing)} missing", anew),
        _rule("no others are", not unknown, f"{', '.join(unknown)} unknown", "leave them out"),
        _rule("shapes fit the config", not wrong, "; ".join(wrong), anew),
        _rule(
            "the file's dtype is the config's",
            dtypes == {FILE_DTYPES.get(str(said.dtype))},
            f"it is {', '.join(sorted(dtypes))}, not {said.dtype}",
            "write the file's dtype into config.json",
        ),
        _rule("weights are finite", not infinite, f"{', '.join(infinite)} are not", anew),
    ]


def _rule(rule: str, kept: bool, fault: str, mend: str) -> Finding:
    return Finding(rule) if kept else Finding(rule, fault, mend)


def _equal(found: Mapping[str, Any], key: str, wanted: Any, where: str = "") -> Finding:
    value = found.get(key)
    return _rule(f"{where}{key} is {wanted!r}", value == wanted, f"it is {value!r}", "write that")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(item) for item in value)
