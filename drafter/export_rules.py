"""What engines ask of a drafter's folder, as rules that are kept or broken.

The rules are those of the public loaders, restated: vLLM's `DFlashDraftModel` and its reading of
speculators configs, SGLang's `DFlashDraftModel` and `parse_dflash_draft_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from drafter.config import FULL, MAX_BLOCK_SIZE, SLIDING
from drafter.speculators_layout import is_speculators, told_block_size, verifier_name

FILE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
IDS_RULE = "target layer ids are different layers, none of them the last"
SIZES_RULE = "sizes are whole numbers from 1"
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
        draft_vocab_size: R of a reduced draft vocabulary, None for the target's.
    """

    layers: Mapping[str, Any]
    block_size: Any
    mask_token_id: Any
    target_layer_ids: Any
    num_target_layers: Any
    dtype: Any
    draft_vocab_size: Any = None


def said_by(config: Mapping[str, Any]) -> Said:
    """Returns what a config.json of either layout says."""
    return _from_speculators(config) if is_speculators(config) else _from_zlab(config)


def config_rules(config: Mapping[str, Any]) -> list[Finding]:
    """Returns every rule for a config.json of either layout, kept or not."""
    said = said_by(config)
    if is_speculators(config):
        return _speculators_rules(config, said) + _common_rules(said)
    return _zlab_rules(config) + _common_rules(said)


def rule(name: str, kept: bool, fault: str, mend: str) -> Finding:
    """Returns a finding whose fault counts unless the rule is kept."""
    return Finding(name) if kept else Finding(name, fault, mend)


def _from_zlab(config: Mapping[str, Any]) -> Said:
    dflash = _mapping(config.get("dflash_config"))
    return Said(
        config,
        dflash.get("block_size", config.get("block_size")),
        dflash.get("mask_token_id"),
        dflash.get("target_layer_ids"),
        config.get("num_target_layers"),
        _dtype(config),
    )


def _from_speculators(config: Mapping[str, Any]) -> Said:
    ids = config.get("aux_hidden_state_layer_ids")
    layers = _mapping(config.get("transformer_layer_config"))
    kept, vocab_size = config.get("draft_vocab_size"), layers.get("vocab_size")
    return Said(
        layers,
        told_block_size(config),
        config.get("mask_token_id"),
        [i - 1 for i in ids] if _is_ints(ids) else ids,
        config.get("num_target_layers"),
        _dtype(config),
        kept if _is_int(kept) and _is_int(vocab_size) and 1 <= kept < vocab_size else None,
    )


def _dtype(config: Mapping[str, Any]) -> Any:
    return config.get("dtype", config.get("torch_dtype"))


def _zlab_rules(config: Mapping[str, Any]) -> list[Finding]:
    dflash = _mapping(config.get("dflash_config"))
    sizes = {repr(found["block_size"]) for found in (config, dflash) if "block_size" in found}
    told = (config.get("is_causal"), dflash.get("causal"))
    causal = {value for value in told if value is not None}
    return [
        _equal(config, "architectures", ["DFlashDraftModel"]),
        _equal(config, "model_type", "qwen3"),
        rule(
            "block_size stands once, or twice alike",
            len(sizes) == 1,
            f"it is {', '.join(sorted(sizes)) or 'absent'}",
            "write it at the top level or in dflash_config",
        ),
        rule(
            "is_causal and dflash_config.causal, if told, say the same",
            len(causal) < 2,
            f"they are {told[0]!r} and {told[1]!r}",
            "write what it was trained with into both",
        ),
        rule(
            "it drafts from the target's whole vocabulary",
            config.get("draft_vocab_size") in (None, config.get("vocab_size")),
            f"draft_vocab_size is {config.get('draft_vocab_size')!r}",
            "export it with --format speculators, which says from which tokens",
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
        rule(
            "speculators_config proposes K - 1 tokens by its default method",
            drafted == [wanted] and wanted is not None,
            f"{default!r} proposes {drafted or 'nothing'} for K = {said.block_size}",
            f"write speculative_tokens {wanted} into its proposal method",
        ),
        rule(
            "speculators_config.verifier.name_or_path names the target",
            bool(verifier_name(config)),
            "it names none",
            "write the target's folder or hub name, or export with --verifier",
        ),
        rule(
            "draft_vocab_size is the target's vocabulary, or less",
            _is_int(config.get("draft_vocab_size"))
            and _is_int(vocab_size)
            and 1 <= config["draft_vocab_size"] <= vocab_size,
            f"it is {config.get('draft_vocab_size')}, of {vocab_size}",
            f"write {vocab_size}, or the length of d2t",
        ),
        rule(
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
    scaling = _mapping(layers.get("rope_scaling"))
    thetas = {
        float(found["rope_theta"])
        for found in (layers, rope)
        if isinstance(found.get("rope_theta"), int | float)
    }
    kinds, depth = layers.get("layer_types"), layers.get("num_hidden_layers")
    known = kinds is None or (
        isinstance(kinds, list) and len(kinds) == depth and set(kinds) <= {FULL, SLIDING}
    )
    window = layers.get("sliding_window") if layers.get("use_sliding_window") else None
    slides = isinstance(kinds, list) and SLIDING in kinds
    absent = [key for key in SIZES if not _is_int(layers.get(key)) or layers[key] < 1]
    return [
        rule(
            f"block_size is 2 to {MAX_BLOCK_SIZE}",
            _is_int(said.block_size) and 2 <= said.block_size <= MAX_BLOCK_SIZE,
            f"it is {said.block_size!r}",
            "write the K that it was trained with",
        ),
        rule(
            "mask_token_id is a token of the vocabulary",
            _is_int(said.mask_token_id)
            and _is_int(layers.get("vocab_size"))
            and 0 <= said.mask_token_id < layers["vocab_size"],
            f"it is {said.mask_token_id!r}, of {layers.get('vocab_size')} tokens",
            "write the id that it was trained with",
        ),
        rule(
            IDS_RULE,
            _is_ints(ids)
            and len(set(ids)) == len(ids) > 0
            and min(ids) >= 0
            and (last is None or max(ids) <= last),
            f"they are {ids!r} (0-based) of {most} layers",
            "write those that it was trained with (speculators writes each plus 1)",
        ),
        rule(
            SIZES_RULE,
            not absent,
            f"{', '.join(absent)}: {', '.join(repr(layers.get(key)) for key in absent)}",
            "write them",
        ),
        _equal(layers, "hidden_act", "silu"),
        rule(
            f"layer_types is {FULL} or {SLIDING} for each layer",
            known,
            f"it is {kinds!r} for {depth} layers",
            "write those that it was trained with",
        ),
        rule(
            "sliding layers have a window",
            not slides or (_is_int(window) and window >= 1),
            f"sliding_window is {layers.get('sliding_window')!r}, use_sliding_window "
            f"{layers.get('use_sliding_window')!r}",
            "write the window that it was trained with, and use_sliding_window true",
        ),
        rule(
            "rope_theta and rope_parameters say the same",
            len(thetas) == 1,
            f"theta is {sorted(thetas) or 'absent'}",
            "write the target's into both",
        ),
        rule(
            "rope_scaling and rope_parameters say the same",
            "rope_scaling" not in layers or not rope or _kind(scaling) == _kind(rope),
            f"type and factor are {_kind(scaling)} and {_kind(rope)}",
            "write the target's into both",
        ),
        rule(
            "num_target_layers, if told, is at least 1",
            most is None or (_is_int(most) and most >= 1),
            f"it is {most!r}",
            "write the target's number of layers, or leave it out",
        ),
        rule(
            f"dtype is one of {', '.join(FILE_DTYPES)}",
            str(said.dtype) in FILE_DTYPES,
            f"it is {said.dtype!r}",
            "write that of the file",
        ),
    ]


def _equal(found: Mapping[str, Any], key: str, wanted: Any, where: str = "") -> Finding:
    value = found.get(key)
    return rule(f"{where}{key} is {wanted!r}", value == wanted, f"it is {value!r}", "write that")


def _kind(rope: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns type and factor; older configs call the first "type"."""
    return rope.get("rope_type", rope.get("type", "default")), rope.get("factor")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(_is_int(item) for item in value)
