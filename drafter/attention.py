"""Which keys a block slot sees, and the attention that obeys it.

Legend: B rows, S context tokens, A anchors, K block size, Q = A*K queries, H heads, E head size.

Keys are the S context positions followed by the Q block slots. One definition, `is_visible`,
serves the dense mask of SDPA, flex_attention's mask and the element-by-element test.

Sliding windows and causal blocks are those of public inference code: z-lab's `dflash/model.py`
(`_attention_mask`), vLLM's `qwen3_dflash.py` (`_resolve_layer_attention`) and SGLang's
`models/dflash.py`, and of SpecForge's training masks. A window of w holds the query's own position
and the w - 1 before it, and moves with the slot: slot k sees context from anchor + k - w + 1 on.
The speculators library (0.9) trains with another edge, w context positions before the anchor for
all slots; vLLM serves what it trained with the edge that is used here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["auto", "sdpa", "flex"]

FLEX_MIN_SCORES = 1 << 20
"""`auto` takes flex_attention on CUDA from this many scores per row and head (Q * (S + Q)). At
880,000 of them an H100 spends as long on either, 25 ms a step, and compiling flex takes 20 s."""

FLEX_MIN_HEAD_DIM = 16
TILE = 128
"""Queries, and keys, that flex_attention's mask is kept for together."""
HOPPER, TUNED_HEAD_DIM = (9, 0), 128
KERNELS = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 4,
    "bwd_num_stages": 3,
}
"""flex_attention's tiles on such cards for such heads in 16 bits (docs/performance.md): smaller
than its own, so that the many queries of a context's first keys are shared out better."""


class LayerAttention(NamedTuple):
    """How far the slots of one layer see."""

    window: int | None = None
    """Positions from the query's own on that are near enough, on both sides unless causal; None
    for all."""
    causal: bool = False
    """Whether a slot sees no later slot of its block."""


FULL = LayerAttention()


def is_visible(
    query: Tensor,
    key: Tensor,
    anchor: Tensor,
    anchor_document: Tensor,
    key_document: Tensor,
    context_length: int | Tensor,
    block_size: int,
    window: int | None = None,
    causal: bool = False,
) -> Tensor:
    """Returns whether block slot `query` sees key `key` (method.md, Visibility); broadcasts.

    A slot sees context position p iff p < anchor (strictly: at inference the anchor token has not
    been through the target) in the anchor's document, and every slot of its own block. Blocks
    never see each other. An invalid block (anchor -1) sees itself only, which keeps its softmax
    finite.

    Args:
        query: Flattened slot index a*K + k.
        key: Key index; below `context_length` a context position, else context_length + slot.
        anchor: Row index of the query block's anchor, -1 for an invalid block.
        anchor_document: Document id at that anchor.
        key_document: Document id at context position `key` (any value for block keys), -1 for
            padding.
        context_length: S; a 0-d tensor in compiled masks, which then serve every S.
        block_size: K.
        window: Narrows what is seen, as `LayerAttention` says; rows hold a document's tokens one
            after another, so that distances in a row are distances in the document.
        causal: Likewise.
    """
    in_context = key < context_length
    sees_context = (key < anchor) & (key_document == anchor_document) & (key_document >= 0)
    slot = key - context_length
    same_block = slot // block_size == query // block_size
    visible = torch.where(in_context, sees_context, same_block)
    if window is None and not causal:
        return visible
    offset = query % block_size
    distance = torch.where(in_context, anchor + offset - key, offset - slot % block_size)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    return visible


@dataclass(frozen=True, eq=False)
class Visibility:
    """A mask in the form that the chosen attention takes: `dense` or `flex` is set."""

    dense: Tensor | None = None
    """(B, 1, Q, S + Q) bool, True where visible."""
    flex: Any = None
    """A `torch.nn.attention.flex_attention.BlockMask` of B * `groups` rows."""
    groups: int = 1
    """Query heads of a group that run as rows of their own; more than 1 for a single row only."""
    kernels: dict[str, int] | None = None
    """Options of flex_attention's for 16-bit queries; None for its own."""


def build_visibility(
    anchors_BA: Tensor,
    document_ids_BS: Tensor,
    block_size: int,
    attention: AttentionKind = "auto",
    head_dim: int = FLEX_MIN_HEAD_DIM,
    layer: LayerAttention = FULL,
    groups: int = 1,
) -> Visibility:
    """Returns the visibility of B x A blocks over their rows, in one kind of layer.

    Args:
        anchors_BA: (B, A) int64 row indices of the anchors, -1 for invalid blocks.
        document_ids_BS: (B, S) int64, -1 at padding. S is the length of the encoded context.
        block_size: K.
        attention: `sdpa` (dense mask), `flex` (CUDA only), or `auto`: flex where it pays.
        head_dim: E; flex_attention's kernels need at least `FLEX_MIN_HEAD_DIM`.
        layer: The kind.
        groups: H / H_kv, the query heads that share a key/value head. flex_attention's backward
            pass shares out its work better if it knows.
    """
    length = document_ids_BS.shape[1]
    if choose_attention(attention, anchors_BA, length, block_size, head_dim) == "flex":
        groups = groups if len(anchors_BA) == 1 else 1
        rows = groups * len(anchors_BA)
        anchors_BA, document_ids_BS = anchors_BA.expand(rows, -1), document_ids_BS.expand(rows, -1)
        mask = _flex_mask(anchors_BA, document_ids_BS, block_size, layer)
        kernels = _kernels(head_dim, anchors_BA.device)
        return Visibility(flex=mask, groups=groups, kernels=kernels)
    return Visibility(dense=_dense_mask(anchors_BA, document_ids_BS, block_size, layer))


def build_visibilities(
    layers: Sequence[LayerAttention],
    anchors_BA: Tensor,
    document_ids_BS: Tensor,
    block_size: int,
    attention: AttentionKind = "auto",
    head_dim: int = FLEX_MIN_HEAD_DIM,
    groups: int = 1,
) -> tuple[Visibility, ...]:
    """Returns `build_visibility` of every layer; layers of one kind share it."""
    made = {
        layer: build_visibility(
            anchors_BA, document_ids_BS, block_size, attention, head_dim, layer, groups
        )
        for layer in dict.fromkeys(layers)
    }
    return tuple(made[layer] for layer in layers)


def last_block_visibility(
    layer: LayerAttention, context_length: int, block_size: int, device: torch.device
) -> Visibility | None:
    """Returns what one block right behind its whole context sees; None for every key.

    Args:
        layer: The kind of layer.
        context_length: S, all of the block's document.
        block_size: K.
        device: Of the mask.
    """
    if layer == FULL:
        return None
    zero = torch.zeros((), dtype=torch.long, device=device)
    query_K1 = torch.arange(block_size, device=device)[:, None]
    key_1Q = torch.arange(context_length + block_size, device=device)[None]
    dense_KQ = is_visible(
        query_K1, key_1Q, zero + context_length, zero, zero, context_length, block_size, *layer
    )
    return Visibility(dense=dense_KQ[None, None])


def choose_attention(
    attention: AttentionKind,
    anchors_BA: Tensor,
    context_length: int,
    block_size: int,
    head_dim: int = FLEX_MIN_HEAD_DIM,
) -> Literal["sdpa", "flex"]:
    """Returns the attention to use; `auto` goes by device and work size."""
    if attention != "auto":
        return attention
    queries = anchors_BA.shape[1] * block_size
    large = queries * (context_length + queries) >= FLEX_MIN_SCORES
    fits = anchors_BA.is_cuda and head_dim >= FLEX_MIN_HEAD_DIM
    return "flex" if fits and large and _flex_works("cuda", head_dim) else "sdpa"


def attend(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility | None) -> Tensor:
    """Returns softmax(q k / sqrt(E)) v over the visible keys.

    Args:
        query: (B, H, Q, E).
        key: (B, H_kv, S + Q, E); H_kv divides H.
        value: Like `key`.
        visibility: None lets every query see every key (one block at inference).
    """
    if visibility is not None and visibility.flex is not None:
        return _flex_attend(query, key, value, visibility)
    groups = query.shape[1] // key.shape[1]
    # SDPA's fused kernels refuse a mask together with enable_gqa
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = None if visibility is None else visibility.dense
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _flex_attend(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    compiling = torch.compiler.is_compiling()  # then it becomes a part of what is compiled
    flex = _flex_module().flex_attention if compiling else _compiled_flex()
    groups = visibility.groups
    if groups > 1:
        # In the backward pass one program makes a tile of keys' gradient, of all query heads that
        # share them. Most queries see the early keys, so theirs end long after the others. As rows,
        # each of these heads makes its own part.
        query = query.squeeze(0).unflatten(0, (-1, groups)).transpose(0, 1)
    out: Tensor = flex(
        query,
        key,
        value,
        block_mask=visibility.flex,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=visibility.kernels if query.element_size() == 2 else None,
    )
    return out.transpose(0, 1).flatten(0, 1).unsqueeze(0) if groups > 1 else out


def _anchor_documents(anchors_BA: Tensor, document_ids_BS: Tensor) -> Tensor:
    return document_ids_BS.gather(1, anchors_BA.clamp(0, document_ids_BS.shape[1] - 1))


def _dense_mask(
    anchors_BA: Tensor, document_ids_BS: Tensor, block_size: int, layer: LayerAttention = FULL
) -> Tensor:
    context_length = document_ids_BS.shape[1]
    slots = anchors_BA.shape[1] * block_size
    device = anchors_BA.device
    anchor_BQ1 = anchors_BA.repeat_interleave(block_size, 1).unsqueeze(-1)
    document_BQ1 = _anchor_documents(anchors_BA, document_ids_BS)
    document_BQ1 = document_BQ1.repeat_interleave(block_size, 1).unsqueeze(-1)
    key_document_B1K = F.pad(document_ids_BS, (0, slots), value=-1).unsqueeze(1)
    query_1Q1 = torch.arange(slots, device=device).view(1, -1, 1)
    key_11K = torch.arange(context_length + slots, device=device).view(1, 1, -1)
    return is_visible(
        query_1Q1,
        key_11K,
        anchor_BQ1,
        document_BQ1,
        key_document_B1K,
        context_length,
        block_size,
        *layer,
    ).unsqueeze(1)


def _flex_mask(
    anchors_BA: Tensor, document_ids_BS: Tensor, block_size: int, layer: LayerAttention = FULL
) -> Any:
    context_length = document_ids_BS.shape[1]
    slots = anchors_BA.shape[1] * block_size
    anchor_document_BA = _anchor_documents(anchors_BA, document_ids_BS)
    # filled on the device: a copy from the host would wait for it
    length = torch.full((), context_length, device=anchors_BA.device)
    # torch 2.13 doesn't guard a named tuple that a mask closes over: one kind of layer would run
    # what was compiled for another
    window, causal = layer

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = q // block_size
        key_document = document_ids_BS[b, torch.minimum(kv, length - 1)]
        return is_visible(
            q,
            kv,
            anchors_BA[b, block],
            anchor_document_BA[b, block],
            key_document,
            length,
            block_size,
            window,
            causal,
        )

    tiles = _classify_tiles(anchors_BA, anchor_document_BA, document_ids_BS, block_size, layer)
    by_queries = [part for kind_BUV in tiles for part in _as_lists(kind_BUV)]
    by_keys = [part for kind_BUV in tiles for part in _as_lists(kind_BUV.mT)]
    lengths = (slots, context_length + slots)
    return _flex_module().BlockMask(
        lengths, *by_queries, *by_keys, BLOCK_SIZE=(TILE, TILE), mask_mod=mask_mod
    )


def _classify_tiles(
    anchors_BA: Tensor,
    anchor_document_BA: Tensor,
    document_ids_BS: Tensor,
    block_size: int,
    layer: LayerAttention,
) -> tuple[Tensor, Tensor]:
    """Returns which tiles of scores flex_attention visits: those to mask, and those seen whole.

    From the least and largest anchor and document of a tile's queries and keys: no score is looked
    at. A tile that is neither holds nothing visible; one to mask may not either, which costs time.

    Returns:
        (B, U, V) bool each, of U tiles of queries and V of keys, the last ones perhaps cut off.
    """
    context, slots = document_ids_BS.shape[1], anchors_BA.shape[1] * block_size
    device = anchors_BA.device
    anchor_BQ = anchors_BA.repeat_interleave(block_size, 1)
    least_BU1, most_BU1 = _ranges(anchor_BQ)
    document_BU1 = _ranges(anchor_document_BA.repeat_interleave(block_size, 1))
    block_Q = torch.arange(slots, device=device) // block_size
    block_1U1 = _ranges(block_Q[None])

    # keys: of the context's documents -1 behind its end, of the slots' blocks -1 before it
    document_BS = F.pad(document_ids_BS, (0, slots), value=-1)
    document_B1V = [bound.mT for bound in _ranges(document_BS)]
    block_11V = [bound.mT for bound in _ranges(F.pad(block_Q[None], (context, 0), value=-1))]
    start_V = torch.arange(0, context + slots, TILE, device=device)
    last_V = (start_V + TILE - 1).clamp(max=context + slots - 1)

    near, within = last_V >= 0, start_V >= 0  # all of them
    if layer.window is not None:
        near = last_V > least_BU1 - layer.window
        within = start_V > most_BU1 + block_size - 1 - layer.window
    in_context = (start_V < context) & (start_V < most_BU1) & near & (document_B1V[1] >= 0)
    in_context = in_context & _meet(document_BU1, document_B1V)
    own_block = (last_V >= context) & _meet(block_1U1, block_11V)
    some_BUV = in_context | own_block

    # slots see all of their block but for a window or causality, all of the context before it
    one_document = (document_BU1[0] == document_BU1[1]) & (document_B1V[0] == document_B1V[1])
    every_BUV = in_context & one_document & (last_V < context) & (last_V < least_BU1) & within
    if layer == FULL:
        one_block = (block_1U1[0] == block_1U1[1]) & (block_11V[0] == block_11V[1])
        every_BUV = every_BUV | (own_block & one_block & (start_V >= context))
    whole_U1 = torch.arange(TILE, slots + TILE, TILE, device=device)[:, None] <= slots
    every_BUV = every_BUV & whole_U1 & (start_V + TILE <= context + slots)
    return some_BUV & ~every_BUV, every_BUV


def _ranges(numbers_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest number of each tile, (B, U, 1)."""
    last_BP = numbers_BN[:, -1:].expand(-1, -numbers_BN.shape[1] % TILE)
    tiles_BUN = torch.cat((numbers_BN, last_BP), 1).view(len(numbers_BN), -1, TILE)
    return tiles_BUN.amin(-1, keepdim=True), tiles_BUN.amax(-1, keepdim=True)


def _meet(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Returns whether two ranges (least, largest) have a number in common."""
    return (one[0] <= other[1]) & (other[0] <= one[1])


def _as_lists(tiles_BUV: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many tiles of a row are meant (B, 1, U), and these first (B, 1, U, V), int32."""
    # kernels read lists row by row, whatever their strides say
    order = tiles_BUV.int().contiguous().argsort(dim=-1, descending=True, stable=True)
    return tiles_BUV.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@functools.cache
def _kernels(head_dim: int, device: torch.device) -> dict[str, int] | None:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    return KERNELS if hopper and head_dim == TUNED_HEAD_DIM else None


def _flex_module() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    flex: Callable[..., Any] = _flex_module().flex_attention
    if not torch.cuda.is_available():
        return flex  # uncompiled flex on a CPU is the slow reference that tests use
    # under DDP dynamo would look for weights to split what it compiles by: here are none
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(flex, dynamic=True)


@functools.cache
def _flex_works(device: str, head_dim: int) -> bool:
    """Tries one small compiled forward and backward; some cards lack the shared memory it needs."""
    try:
        # asked first by a validation, perhaps, where no gradient is wanted
        with torch.inference_mode(False), torch.enable_grad():
            document_ids = torch.zeros(1, 256, dtype=torch.long, device=device)
            anchors = torch.arange(8, 40, 4, device=device).unsqueeze(0)
            visibility = build_visibility(anchors, document_ids, 16, "flex", head_dim, groups=2)
            trained = device == "cuda"  # a CPU's flex has no backward
            query, key = (
                torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=trained)
                for shape in ((1, 4, 128, head_dim), (1, 2, 384, head_dim))
            )
            out = attend(query, key, key, visibility)
            if trained:
                out.sum().backward()
            return True
    except Exception as error:
        message = f"flex_attention does not work here, using SDPA instead: {error}"
        warnings.warn(message, stacklevel=2)
        return False
