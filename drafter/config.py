"""The drafter's configuration, in the flat layout that published DFlash drafters use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from drafter.attention import LayerAttention
from drafter.errors import UserError

MAX_BLOCK_SIZE = 64
FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of `layer_types`."""
_SINKS = "has attention sinks, which are not computed here"
_INTERLEAVED = "has an interleaved rope; only the half-split one is computed"
NOT_COMPUTED = (
    ("attention_sink_bias", False, _SINKS),
    ("add_swa_attention_sink_bias", False, _SINKS),
    ("is_neox_style", True, _INTERLEAVED),
    ("rope_is_neox_style", True, _INTERLEAVED),
    (
        "sample_from_anchor",
        False,
        "predicts a token at the anchor's slot (sample_from_anchor), which is never done here",
    ),
    (
        "partial_rotary_factor",
        1.0,
        "has a partial_rotary_factor; only a rope over whole heads is computed",
    ),
)
"""Keys of a published config, the value that asks for nothing, and what another one means."""
_OF_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


class DrafterConfig(Qwen3Config):
    """A flat Qwen3 config plus what a block-diffusion drafter needs (method.md, last section).

    Sliding layers are told as transformers' Qwen3 does: `layer_types`, `sliding_window` and
    `use_sliding_window`. NVIDIA's and Xiaomi's `dflash_config.use_swa` with `swa_window_size` (all
    layers slide, none is causal unless told) is read into these.

    Attributes:
        block_size: K, tokens per block with the anchor slot; 2 to 64.
        num_target_layers: Decoder layers of the target that it was made for.
        draft_vocab_size: R, tokens that it drafts from (`drafter.draft_vocabulary`); None for all
            of the target's.
        dflash_config: `mask_token_id` and `target_layer_ids` (0-based decoder layers; id i is the
            output of layer i), kept in one mapping as vLLM and SGLang read it; and
            `confidence_head`, true, of a drafter that has one.
        is_causal: Whether slots see no later slot of their block, in all layers; None for in
            sliding ones only. Also read from, and written to, `dflash_config.causal`.
    """

    block_size: int = 16
    num_target_layers: int = 0
    dflash_config: dict | None = None
    draft_vocab_size: int | None = None
    is_causal: bool | None = None
    layer_types: list[str] | None = None  # as Qwen3Config has it

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.architectures = ["DFlashDraftModel"]
        dflash = dict(self.dflash_config or {})
        # newer published configs carry the block size inside dflash_config
        self.block_size = int(dflash.pop("block_size", self.block_size))
        for key, flag in (("is_causal", self.is_causal), ("causal", dflash.get("causal"))):
            check_flag(key, flag)
        check_flag("use_swa", dflash.get("use_swa"))
        causal = dflash.get("causal") if self.is_causal is None else self.is_causal
        window = dflash.pop("swa_window_size", None)
        if dflash.pop("use_swa", False) and SLIDING not in (self.layer_types or []):
            self.layer_types = [SLIDING] * self.num_hidden_layers
            causal = bool(causal)
        if window is not None:
            self.use_sliding_window, self.sliding_window = True, window
        if causal is not None:  # z-lab's code reads one place, older engines the other
            self.is_causal = dflash["causal"] = bool(causal)
        self.dflash_config = dflash
        check_block_size(self.block_size)

    @property
    def num_drafted(self) -> int:
        """N = K - 1, the drafted slots of a block."""
        return self.block_size - 1

    @property
    def mask_token_id(self) -> int:
        """Token id at slots 1..N of a block's input."""
        return int(self._dflash("mask_token_id"))

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The L tapped decoder layers of the target, in the order of the columns of `fc`."""
        return tuple(int(i) for i in self._dflash("target_layer_ids"))

    @property
    def layer_attention(self) -> tuple[LayerAttention, ...]:
        """How far each layer's slots see (vLLM's `_resolve_layer_attention`)."""
        slides = [kind == SLIDING for kind in self.layer_types or [FULL] * self.num_hidden_layers]
        return tuple(
            LayerAttention(
                self.sliding_window if sliding else None,
                sliding if self.is_causal is None else self.is_causal,
            )
            for sliding in slides
        )

    @property
    def num_key_value_groups(self) -> int:
        """H / H_kv, the query heads that share a key/value head (transformers' term)."""
        heads = self.num_attention_heads
        return int(heads // (self.num_key_value_heads or heads))

    @property
    def embedding_scale(self) -> float:
        """Factor on block inputs beside the target's own (`input_embedding_scale`)."""
        return float(self._told("input_embedding_scale") or 1.0)

    @property
    def told_logits(self) -> dict[str, float]:
        """`output_multiplier` and `final_logit_softcapping` (0: none), if they are told."""
        told = {key: self._told(key) for key in ("output_multiplier", "final_logit_softcapping")}
        return {key: float(value) for key, value in told.items() if value is not None}

    def _told(self, key: str) -> Any:
        return (self.dflash_config or {}).get(key, getattr(self, key, None))

    def _told_anywhere(self, key: str) -> tuple[Any, ...]:
        """Returns what is told at the top level, in dflash_config and of the rope."""
        places = (self.dflash_config or {}, self.rope_parameters or {})
        return (getattr(self, key, None), *(place.get(key) for place in places))

    @property
    def confidence_head(self) -> bool:
        """Whether the drafter has a `drafter.model.ConfidenceHead`."""
        return bool((self.dflash_config or {}).get("confidence_head", False))

    @confidence_head.setter
    def confidence_head(self, has_one: bool) -> None:
        dflash = {k: v for k, v in (self.dflash_config or {}).items() if k != "confidence_head"}
        # without one, the config is what it was before there were any
        self.dflash_config = {**dflash, "confidence_head": True} if has_one else dflash

    def _dflash(self, key: str) -> Any:
        if key not in (self.dflash_config or {}):
            raise UserError(f"The drafter's config.json has no dflash_config.{key}; add it.")
        return (self.dflash_config or {})[key]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, with both rope schemas for readers of either age."""
        out: dict[str, Any] = super().to_dict()
        out["architectures"] = ["DFlashDraftModel"]  # save_pretrained writes the class's name
        if self.is_causal is None:
            del out["is_causal"]
        rope = dict(out.get("rope_parameters") or {})
        out["rope_theta"] = rope.pop("rope_theta", None)
        out["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if self.draft_vocab_size is None:  # as it was before there was such a thing
            out.pop("draft_vocab_size", None)
        return out

    @classmethod
    def for_target(
        cls,
        target_config: PreTrainedConfig,
        *,
        block_size: int,
        num_layers: int,
        target_layer_ids: tuple[int, ...],
        mask_token_id: int,
        intermediate_size: int | None = None,
        draft_vocab_size: int | None = None,
    ) -> DrafterConfig:
        """Returns a config whose widths, heads and rope are the target's.

        Args:
            target_config: The target's (text) config.
            block_size: K.
            num_layers: Drafter layers.
            target_layer_ids: Tapped layers, checked by `drafter.target.check_layer_ids`.
            mask_token_id: See `drafter.mask_token`.
            intermediate_size: Width of the SwiGLU; the target's by default.
            draft_vocab_size: R; None drafts from all tokens.
        """
        heads = target_config.num_attention_heads
        head_dim = getattr(target_config, "head_dim", None) or target_config.hidden_size // heads
        return cls(
            vocab_size=target_config.vocab_size,
            hidden_size=target_config.hidden_size,
            intermediate_size=intermediate_size or target_config.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(target_config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            max_position_embeddings=target_config.max_position_embeddings,
            rms_norm_eps=_norm_eps(target_config),
            rope_parameters=_full_attention_rope(target_config),
            tie_word_embeddings=False,
            block_size=block_size,
            num_target_layers=target_config.num_hidden_layers,
            dflash_config={
                "mask_token_id": mask_token_id,
                "target_layer_ids": list(target_layer_ids),
            },
            draft_vocab_size=draft_vocab_size,
        )


def check_block_size(block_size: int) -> None:
    """Raises UserError unless 2 <= K <= 64: a block of 1 has nothing to draft."""
    if not 2 <= block_size <= MAX_BLOCK_SIZE:
        raise UserError(
            f"block_size is {block_size}, but a block holds the anchor and at least one drafted "
            f"slot: choose 2 to {MAX_BLOCK_SIZE}."
        )


def check_flag(key: str, flag: Any) -> None:
    """Raises UserError for a told flag that is no flag: "false" would count as true."""
    if flag is not None and not isinstance(flag, bool):
        raise UserError(f"The drafter's config.json has {key} {flag!r}; write true or false.")


def check_supported(config: DrafterConfig, where: Path) -> None:
    """Raises UserError for a published config that asks for what `Drafter` does not compute."""
    if config.hidden_act != "silu":
        raise UserError(f"{where} has hidden_act {config.hidden_act!r}; only silu can be computed.")
    kinds, rope = config.layer_types or [], config.rope_parameters or {}
    if kinds and len(kinds) != config.num_hidden_layers:
        raise UserError(
            f"{where} has {len(kinds)} layer_types for {config.num_hidden_layers} layers; write "
            "one of each layer into its config.json."
        )
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise UserError(
            f"{where} has layers of {', '.join(strange)}; only {FULL} and {SLIDING} are computed."
        )
    if SLIDING in kinds and (config.sliding_window or 0) < 1:
        raise UserError(
            f"{where} has layers of {SLIDING} and no window; write sliding_window and "
            "use_sliding_window: true into its config.json."
        )
    for key, neutral, what in NOT_COMPUTED:
        if any(value is not None and value != neutral for value in config._told_anywhere(key)):
            raise UserError(f"{where} {what}.")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where} has a rope of each layer type; only one of all is computed.")
    if SLIDING in kinds and getattr(config, "rope_local_base_freq", None) is not None:
        raise UserError(
            f"{where} has a rope_local_base_freq of sliding layers; only one rope of all is "
            "computed."
        )


def refuse_dflash2(said: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for a DFlash 2 drafter, whose drafts are no product of marginals.

    Its public definition (`DFlash2DraftModel` of z-lab's dflash/model.py and of vLLM) picks every
    token by the one before it, so that neither replay nor rejection sampling here would hold.

    Args:
        said: Content of config.json, in either layout.
        where: The folder, for the message.
    """
    dflash = said.get("dflash_config")
    places = (said, dflash if isinstance(dflash, dict) else {})
    named = "DFlash2DraftModel" in (said.get("architectures") or [])
    named = named or said.get("speculators_model_type") == "dflash2"
    if named or any(key in place for key in _OF_DFLASH2 for place in places):
        raise UserError(
            f"{where} holds a DFlash 2 drafter, whose two-tap convolutions (attention_conv, "
            "mlp_conv) and candidate_selector are not computed here; only DFlash drafters without "
            "them can be read."
        )


def _norm_eps(target_config: PreTrainedConfig) -> float:
    """Returns the target's norm epsilon, whatever its family calls it."""
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        eps = getattr(target_config, name, None)
        if eps is not None:
            return float(eps)
    return 1e-6


def _full_attention_rope(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the rope of full-attention layers (Gemma-3 keeps one set per layer type)."""
    rope = dict(target_config.rope_parameters)
    return dict(rope["full_attention"]) if "full_attention" in rope else rope
