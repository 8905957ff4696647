"""The block-diffusion drafter (DFlash, arXiv 2602.06036): one denoising step over blocks.

Legend: B rows, S context tokens, A blocks per row, K block size, D hidden size, L tapped layers,
H heads, G key/value heads, E head size, R tokens of a reduced draft vocabulary.

Training, replay and decoding run the same two functions: `encode_context` turns the target's
features into keys and values (appending to those already there), `denoise` runs blocks over them.
Decoding is the case of one block behind the whole context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from drafter.attention import FULL, Visibility, attend, last_block_visibility
from drafter.config import DrafterConfig
from drafter.draft_vocabulary import ReducedHead
from drafter.errors import UserError
from drafter.head import FrozenHead
from drafter.recompute import keep_products_only, product


@dataclass
class DraftContext:
    """Keys and values of the context features, per drafter layer; committed tokens only."""

    keys: list[Tensor] = field(default_factory=list)
    """Per layer (B, G, S, E), after q/k norm and RoPE."""
    values: list[Tensor] = field(default_factory=list)
    """Per layer (B, G, S, E)."""

    @property
    def length(self) -> int:
        """S, context positions held."""
        return self.keys[0].shape[2] if self.keys else 0


class RMSNorm(nn.Module):
    """Root-mean-square norm in the input's dtype with fp32 statistics; weight (D,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised and scaled x (..., D)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Projection(nn.Linear):
    """A linear map; in a compiled step under autocast see `drafter.recompute.product`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out) of x (..., in)."""
        compiled = torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)
        if not compiled or self.bias is not None:
            return super().forward(x)
        return product(for_products(x), self.weight)


class DraftAttention(nn.Module):
    """Queries from the block; keys and values from [context ; block] with the same projections."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        bias = config.attention_bias
        self.head_dim = head_dim
        self.q_proj = Projection(width, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = Projection(width, kv_heads * head_dim, bias=bias)
        self.v_proj = Projection(width, kv_heads * head_dim, bias=bias)
        self.o_proj = Projection(config.num_attention_heads * head_dim, width, bias=bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def keys_values(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, G, S, E) of states (B, S, D) at `rope`'s positions."""
        values_BGSE = self._heads(self.v_proj(x_BSD))
        keys_BGSE = rotate(self.k_norm(self._heads(self.k_proj(x_BSD))), rope)
        return keys_BGSE.to(values_BGSE.dtype), values_BGSE

    def forward(
        self,
        block_BQD: Tensor,
        rope: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        visibility: Visibility | None,
    ) -> Tensor:
        """Returns (B, Q, D) for Q = A*K flattened block slots."""
        query_BHQE = rotate(self.q_norm(self._heads(self.q_proj(block_BQD))), rope)
        keys_BGQE, values_BGQE = self.keys_values(block_BQD, rope)
        keys = torch.cat((context[0], keys_BGQE), dim=2)
        values = torch.cat((context[1], values_BGQE), dim=2)
        out_BHQE = attend(query_BHQE.to(values.dtype), keys, values, visibility)
        out: Tensor = self.o_proj(out_BHQE.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x_BSF: Tensor) -> Tensor:
        rows, length, _ = x_BSF.shape
        heads = x_BSF.shape[-1] // self.head_dim
        return x_BSF.view(rows, length, heads, self.head_dim).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated MLP of the Qwen3 family."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., D) of x (..., D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """Pre-norm block; `input_layernorm` acts on the block stream only, the context enters raw."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BQD: Tensor,
        rope: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        visibility: Visibility | None,
    ) -> Tensor:
        """Returns (B, Q, D)."""
        normed_BQD = for_products(self.input_layernorm(x_BQD))
        x_BQD = x_BQD + self.self_attn(normed_BQD, rope, context, visibility)
        normed_BQD = for_products(self.post_attention_layernorm(x_BQD))
        out_BQD: Tensor = x_BQD + self.mlp(normed_BQD)
        return out_BQD


class ConfidenceHead(nn.Module):
    """Logit of the chance that a slot's draft is accepted, once all before it are: w . x + b.

    It reads the state that the target's head reads, so it knows the block and no drawn token.
    Starts at zero, that is at a chance of 1/2, and so draws nothing from the random generator.
    Source: DSpark (arXiv 2607.05147), whose head is this linear map where it does without the
    Markov head's features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))  # a vector: no decay, and not Muon's
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns logits (...,) in fp32 (fp64 of fp64 states) of states (..., D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return hidden.to(dtype) @ self.weight.to(dtype) + self.bias.to(dtype)


class Drafter(PreTrainedModel):
    """DFlash drafter without embedding and head: both are borrowed from the target.

    State-dict keys are those of the published layout (method.md, last section): `fc.weight`,
    `hidden_norm.weight`, `norm.weight` and 11 per layer; with a reduced draft vocabulary also
    `draft_tokens`, (R,) int64, the ascending token ids that it drafts from;
    with a confidence head, two more.
    """

    config_class = DrafterConfig
    config: DrafterConfig
    base_model_prefix = ""
    _no_split_modules = ["DraftLayer"]
    draft_tokens: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.fc = Projection(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self._reduced: ReducedHead | None = None
        self.register_buffer("draft_tokens", None)
        if config.draft_vocab_size is not None:
            self.reserve_vocabulary(config.draft_vocab_size)
        self.confidence_head = ConfidenceHead(width) if config.confidence_head else None
        self.post_init()

    def reserve_vocabulary(self, size: int) -> None:
        """Makes room for the R tokens to draft from, which are not known yet (-1)."""
        self.config.draft_vocab_size = size
        self.draft_tokens = torch.full((size,), -1, device=self.fc.weight.device)
        self._reduced = None

    @property
    def lacks_vocabulary(self) -> bool:
        """Whether it drafts from some tokens and is not told yet from which."""
        return self.draft_tokens is not None and int(self.draft_tokens[0]) < 0

    def choose_vocabulary(self, kept: Tensor) -> None:
        """Takes the R tokens to draft from, ascending ids."""
        assert self.draft_tokens is not None
        assert kept.shape == self.draft_tokens.shape
        self.draft_tokens.copy_(kept)
        self._reduced = None

    def head(self, target_head: FrozenHead) -> FrozenHead | ReducedHead:
        """Returns what turns its states into logits: the target's head, or its rows of R tokens.

        These are copied once; a training step and all that decodes share the copy.

        Raises:
            UserError: The tokens are not known.
        """
        if self.draft_tokens is None:
            return target_head
        if self._reduced is None or self._reduced.whole is not target_head:
            if self.lacks_vocabulary:
                raise UserError(
                    f"Which {len(self.draft_tokens)} tokens the drafter drafts from is not known: "
                    "`fit` counts them and checkpoints keep them; give a checkpoint (--ckpt_path)."
                )
            # a callback may be the first to ask, and training goes on with what it got
            with torch.inference_mode(False), torch.no_grad():
                self._reduced = ReducedHead.of(target_head, self.draft_tokens)
        return self._reduced

    def set_confidence_head(self, has_one: bool) -> None:
        """Gives the drafter a new confidence head, leaves the one that it has, or drops it."""
        if has_one != (self.confidence_head is not None):
            new = ConfidenceHead(self.config.hidden_size).to(self.fc.weight.device)
            self.confidence_head = new.to(self.fc.weight.dtype) if has_one else None
        self.config.confidence_head = has_one

    def encode_context(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        context: DraftContext | None = None,
    ) -> DraftContext:
        """Returns keys and values of target features, appended to `context` if given.

        Args:
            hidden_states: (B, S, L*D) tapped layers side by side, in the config's order.
            positions: (B, S) int64 positions within the document.
            context: What earlier calls returned; it is not changed.
        """
        hidden_states = for_products(hidden_states)
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self._input_dtype())
        new = keep_products_only(self._keys_values, hidden_states, self._rope(positions))
        if context is None or context.length == 0:
            return DraftContext([keys for keys, _ in new], [values for _, values in new])
        return DraftContext(
            [torch.cat((old, keys), 2) for old, (keys, _) in zip(context.keys, new, strict=True)],
            [torch.cat((old, vals), 2) for old, (_, vals) in zip(context.values, new, strict=True)],
        )

    def denoise(
        self,
        block_embeds: Tensor,
        block_positions: Tensor,
        context: DraftContext,
        visibility: Visibility | Sequence[Visibility] | None = None,
    ) -> Tensor:
        """Returns states (B, A, K, D) for the target's head, after the final norm.

        Args:
            block_embeds: (B, A, K, D) target embeddings of the anchor token and of K-1 mask tokens.
            block_positions: (B, A, K) int64 positions within the document.
            context: Of the same B rows.
            visibility: From `drafter.attention.build_visibilities`, one of each layer (or one for
                all, where all see fully); None for one block per row, right behind the context.
        """
        rows, blocks, block_size, _ = block_embeds.shape
        seen: Sequence[Visibility | None]
        if visibility is None:
            assert blocks == 1
            shape = context.length, block_size, block_embeds.device
            kinds = self.config.layer_attention
            made = {kind: last_block_visibility(kind, *shape) for kind in dict.fromkeys(kinds)}
            seen = [made[kind] for kind in kinds]
        elif isinstance(visibility, Visibility):
            assert set(self.config.layer_attention) == {FULL}
            seen = [visibility] * len(self.layers)
        else:
            seen = visibility
        x_BQD = block_embeds.flatten(1, 2).to(self._input_dtype())
        if self.config.embedding_scale != 1.0:
            x_BQD = x_BQD * self.config.embedding_scale
        rope = self._rope(block_positions.flatten(1))
        for layer, keys, values, one in zip(
            self._layers(), context.keys, context.values, seen, strict=True
        ):
            x_BQD = keep_products_only(layer, x_BQD, rope, (keys, values), one)
        # the norm last: FSDP2 would warn of a view that an in-place operation could change
        out: Tensor = self.norm(x_BQD.view(rows, blocks, block_size, x_BQD.shape[-1]))
        return out

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        block_embeds: Tensor,
        block_positions: Tensor,
        visibility: Visibility | Sequence[Visibility] | None = None,
    ) -> Tensor:
        """Returns `denoise` over `encode_context`; shapes as there."""
        context = self.encode_context(hidden_states, positions)
        return self.denoise(block_embeds, block_positions, context, visibility)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Drafter:
        """Moves and casts all but RoPE's frequencies, which stay fp32: in bf16 angles drift."""
        self._reduced = None
        before = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            device = getattr(self.rotary_emb, name).device
            if not (buffer.is_meta or device.type == "meta"):
                setattr(self.rotary_emb, name, buffer.to(device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._reduced = None  # other tokens may come
        super()._load_from_state_dict(*args)

    def _keys_values(
        self, hidden_states: Tensor, rope: tuple[Tensor, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns every layer's keys and values (B, G, S, E) of target features."""
        features_BSD = for_products(self.hidden_norm(self.fc(hidden_states)))
        return [layer.self_attn.keys_values(features_BSD, rope) for layer in self._layers()]

    def _layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", list(self.layers))

    def _rope(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin (B, S, E), always in fp32: bf16 angles are coarse."""
        like = torch.empty(0, device=positions_BS.device, dtype=torch.float32)
        cos, sin = self.rotary_emb(like, positions_BS)
        return cos, sin

    def _input_dtype(self) -> torch.dtype:
        # under autocast the residual stream stays in the dtype of the (fp32) weights
        return self.fc.weight.dtype


def for_products(x: Tensor) -> Tensor:
    """Returns x in the dtype of matrix products: autocast would make each of them its own copy."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Returns x (B, heads, S, E) rotated by rope's cos and sin (B, S, E), half-split convention."""
    cos, sin = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
