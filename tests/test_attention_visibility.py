"""Guards A1 (a block sees states at or after its own anchor) and A8 (NaN from padding blocks)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from drafter import attention as attention_module
from drafter.attention import (
    FULL,
    TILE,
    LayerAttention,
    _flex_works,
    attend,
    build_visibilities,
    build_visibility,
)
from drafter.config import DrafterConfig
from drafter.model import Drafter


def mask_by_definition(anchors, documents, block_size, layer=FULL):
    """Element by element, from method.md's sentence, and each layer's from its positions."""

    def near(slot, key):
        """Both counted from the anchor, which stands at 0."""
        if layer.causal and key > slot:
            return False
        return layer.window is None or key in range(slot - layer.window + 1, slot + layer.window)

    rows, context = documents.shape
    slots = anchors.shape[1] * block_size
    mask = torch.zeros(rows, 1, slots, context + slots, dtype=torch.bool)
    for b in range(rows):
        for q in range(slots):
            anchor = int(anchors[b, q // block_size])
            for p in range(context):
                if anchor >= 0 and p < anchor and documents[b, p] >= 0:
                    same = bool(documents[b, p] == documents[b, anchor])
                    mask[b, 0, q, p] = same and near(q % block_size, p - anchor)
            for s in range(slots):
                same = s // block_size == q // block_size
                mask[b, 0, q, context + s] = same and near(q % block_size, s % block_size)
    return mask


CASES = {
    "both ends of the context": ([[0, 31]], [[0] * 32], 8),
    "overlapping blocks": ([[8, 9, 10, 11]], [[0] * 32], 8),
    "invalid blocks": ([[3, -1, -1], [-1, -1, -1]], [[0] * 12, [0] * 7 + [-1] * 5], 4),
    "packed documents": ([[2, 9, 10, 19]], [[0] * 10 + [1] * 10 + [-1] * 4], 5),
    "slots not a multiple of 128": ([[1, 5, 17]], [[0] * 150], 7),
}


LAYERS = {
    "full": FULL,
    "full and causal": LayerAttention(None, True),
    "window and causal": LayerAttention(6, True),
    "window on both sides": LayerAttention(6),
    "window within the block": LayerAttention(3),
    "window of one": LayerAttention(1, True),
}
WIDE = {"wide window": LayerAttention(300), "wide window, causal": LayerAttention(300, True)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_the_mask_equals_its_element_by_element_definition(case, attention, layer):
    anchors, documents, block_size = CASES[case]
    layer = LAYERS[layer]
    anchors, documents = torch.tensor(anchors), torch.tensor(documents)
    expected = mask_by_definition(anchors, documents, block_size, layer)
    assert expected.any(-1).all()  # a slot that sees nothing would give NaN
    visibility = build_visibility(anchors, documents, block_size, attention, layer=layer)
    if attention == "sdpa":
        assert torch.equal(visibility.dense, expected)
        return
    rows, _, slots, keys = expected.shape
    grid = [
        torch.arange(n).view(shape)
        for n, shape in zip((rows, slots, keys), ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    ]
    seen = visibility.flex.mask_mod(grid[0], torch.zeros(1).long(), grid[1], grid[2])
    assert torch.equal(seen, expected[:, 0])


def tiles_of(counts, indices, shape):
    """Returns (B, U, V) bool from flex_attention's lists of tiles."""
    found = torch.zeros(shape, dtype=torch.bool)
    for b in range(shape[0]):
        for u in range(shape[1]):
            found[b, u, indices[b, 0, u, : counts[b, 0, u]].long()] = True
    return found


def tiled_cases():
    """Yields anchors, documents and block sizes of several tiles each way."""
    torch.manual_seed(1)
    for context, block_size, spread in ((300, 16, 1), (384, 7, 3), (257, 130, 1), (512, 24, 5)):
        anchors = torch.stack([torch.randperm(context)[:20] for _ in range(2)])
        anchors = anchors.sort(1).values if spread < 5 else anchors
        anchors[1, -3:] = -1
        documents = torch.arange(context) * spread // context
        documents = torch.stack([documents, documents])
        documents[1, context - 40 :] = -1
        yield anchors, documents, block_size


@pytest.mark.parametrize("layer", [*LAYERS, *WIDE])
def test_tiles_hold_all_that_is_visible_and_whole_ones_nothing_else(layer):
    layer, whole_tiles = (LAYERS | WIDE)[layer], 0
    for anchors, documents, block_size in tiled_cases():
        dense = build_visibility(anchors, documents, block_size, "sdpa", layer=layer).dense[:, 0]
        mask = build_visibility(anchors, documents, block_size, "flex", layer=layer).flex
        rows, slots, keys = dense.shape
        shape = (rows, -(-slots // TILE), -(-keys // TILE))
        some = tiles_of(mask.kv_num_blocks, mask.kv_indices, shape)
        every = tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices, shape)
        assert not (some & every).any()
        assert mask.seq_lengths == (slots, keys)
        padded = torch.zeros(rows, shape[1] * TILE, shape[2] * TILE, dtype=torch.bool)
        padded[:, :slots, :keys] = dense
        by_tile = padded.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))
        anything, everything = by_tile.any(4).any(2), by_tile.all(4).all(2)
        assert not (anything & ~some & ~every).any()
        assert not (every & ~everything).any()
        whole_tiles += int(every.sum())
    assert (whole_tiles > 0) == (layer.window is None or layer.window > TILE)


def test_tiles_of_sorted_anchors_in_one_document_are_those_that_hold_something():
    anchors = torch.stack((torch.arange(1, 2001, 13), torch.arange(50, 2050, 13)))
    documents = torch.zeros(2, 2048).long()
    mask = build_visibility(anchors, documents, 16, "flex").flex
    truth = create_block_mask(mask.mask_mod, 2, None, *mask.seq_lengths, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(one, f"{name}_num_blocks") for one in (mask, truth)]
        assert torch.equal(*counts)
        assert getattr(mask, f"{name}_indices").is_contiguous()  # kernels take it to be
        shape = (2, counts[0].shape[-1], getattr(mask, f"{name}_indices").shape[-1])
        tiles = [
            tiles_of(count, getattr(one, f"{name}_indices"), shape)
            for count, one in zip(counts, (mask, truth), strict=True)
        ]
        assert torch.equal(*tiles)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (2, 2)])
def test_flex_and_sdpa_attend_alike(rows, heads):
    torch.manual_seed(0)
    anchors = torch.tensor([[3, 9, -1, 40], [0, 5, 12, 13]])[rows]
    documents = torch.zeros(2, 48).long()
    documents[1, 14:] = -1
    documents = documents[rows]
    query, key, value = (
        torch.randn(len(rows), count, length, 16)
        for count, length in zip((heads[0], heads[1], heads[1]), (20, 68, 68), strict=True)
    )
    out = {
        kind: attend(
            query,
            key,
            value,
            build_visibility(anchors, documents, 5, kind, groups=heads[0] // heads[1]),
        )
        for kind in ("sdpa", "flex")
    }
    assert torch.isfinite(out["sdpa"]).all()
    torch.testing.assert_close(out["flex"], out["sdpa"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_kinds_of_layers_attend_over_several_tiles_one_after_another(groups):
    """Shapes are the same: what flex_attention compiles for one kind must not serve another."""
    torch.manual_seed(0)
    anchors = torch.randperm(300)[:20].sort().values[None]
    documents = (torch.arange(300) // 170)[None]
    query = torch.randn(1, 6, 20 * 16, 16)
    key, value = torch.randn(2, 1, 2, 300 + 20 * 16, 16)
    for layer in (FULL, LayerAttention(90), LayerAttention(90, True), LayerAttention(40), FULL):
        made = {
            kind: build_visibility(anchors, documents, 16, kind, layer=layer, groups=groups)
            for kind in ("sdpa", "flex")
        }
        assert made["flex"].groups == groups
        assert made["flex"].flex.kv_num_blocks.shape[0] == groups
        found, expected = (attend(query, key, value, made[kind]) for kind in ("flex", "sdpa"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_several_rows_keep_their_heads_grouped():
    anchors, documents = torch.tensor([[3, 9], [0, 5]]), torch.zeros(2, 48).long()
    visibility = build_visibility(anchors, documents, 5, "flex", groups=2)
    assert visibility.groups == 1
    assert visibility.flex.kv_num_blocks.shape[0] == 2


def small_drafter(block_size=8, layers=2):
    torch.manual_seed(0)
    config = DrafterConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        block_size=block_size,
        num_target_layers=8,
        dflash_config={"mask_token_id": 63, "target_layer_ids": [1, 4]},
    )
    return Drafter(config)


def test_a_block_does_not_move_by_one_bit_when_states_at_or_after_its_anchor_change():
    drafter = small_drafter()
    states = torch.randn(1, 32, 64)
    anchors = torch.tensor([[8, 11]])
    positions = torch.arange(32).unsqueeze(0)
    embeds = torch.randn(1, 2, 8, 32)
    slots = anchors.unsqueeze(-1) + torch.arange(8)
    visibility = build_visibility(anchors, torch.zeros(1, 32).long(), 8, "sdpa")

    def run(changed: slice) -> torch.Tensor:
        other = states.clone()
        other[:, changed] += 1.0
        return drafter(other, positions, embeds, slots, visibility)

    base = run(slice(0, 0))
    later, before, between = run(slice(11, None)), run(slice(10, 11)), run(slice(8, 11))
    assert torch.equal(later[:, 1], base[:, 1])
    assert not torch.equal(before[:, 1], base[:, 1])
    assert torch.equal(between[:, 0], base[:, 0])


@pytest.mark.parametrize(
    "case", ["one anchor", "overlapping anchors", "right padding", "packing", "K of 2"]
)
def test_training_states_equal_those_of_the_decoding_path(case):
    """Master test M: the context of positions < anchor, appended piece by piece, one block."""
    block_size = 2 if case == "K of 2" else 8
    anchors = {"one anchor": [9], "packing": [3, 14, 22]}.get(case, [0, 8, 11, 12, 20])
    drafter = small_drafter(block_size)
    length = 32
    documents = torch.zeros(1, length).long()
    positions = torch.arange(length).unsqueeze(0)
    if case == "packing":
        documents[:, 12:] = 1
        positions = torch.cat((torch.arange(12), torch.arange(length - 12))).unsqueeze(0)
    if case == "right padding":
        documents[:, 24:] = -1
    states, embeds = torch.randn(1, length, 64), torch.randn(1, len(anchors), block_size, 32)
    index = torch.tensor([anchors])
    slots = positions.gather(1, index).unsqueeze(-1) + torch.arange(block_size)
    visibility = build_visibility(index, documents, block_size, "sdpa")
    trained = drafter(states, positions, embeds, slots, visibility)
    for i, anchor in enumerate(anchors):
        begin = 12 if case == "packing" and anchor >= 12 else 0
        context = drafter.encode_context(states[:, begin:begin], positions[:, begin:begin])
        for piece in torch.arange(begin, anchor).split(3):
            context = drafter.encode_context(states[:, piece], positions[:, piece], context)
        assert context.length == anchor - begin
        decoded = drafter.denoise(embeds[:, i : i + 1], slots[:, i : i + 1], context)
        torch.testing.assert_close(decoded, trained[:, i : i + 1], atol=1e-5, rtol=1e-5)


def test_invalid_and_padded_blocks_give_finite_gradients():
    drafter = small_drafter()
    anchors = torch.tensor([[5, 30, -1, -1], [-1, -1, -1, -1]])
    documents = torch.zeros(2, 40).long()
    documents[1, 12:] = -1
    slots = anchors.clamp(min=0).unsqueeze(-1) + torch.arange(8)
    visibility = build_visibility(anchors, documents, 8, "sdpa")
    positions = torch.arange(40).repeat(2, 1)
    out = drafter(torch.randn(2, 40, 64), positions, torch.randn(2, 4, 8, 32), slots, visibility)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in drafter.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_compiled_drafter_is_one_graph(monkeypatch, attention):
    # on CUDA it is a compiled function of its own, which another compiled one stops at
    monkeypatch.setattr(attention_module, "_compiled_flex", None)
    drafter = small_drafter()
    anchors, positions = torch.tensor([[8, 11]]), torch.arange(32).unsqueeze(0)
    visibility = build_visibilities((FULL, FULL), anchors, torch.zeros(1, 32).long(), 8, attention)
    slots = anchors.unsqueeze(-1) + torch.arange(8)
    given = (torch.randn(1, 32, 64), positions, torch.randn(1, 2, 8, 32), slots, visibility)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a CPU's flex has no gradient
        found = torch._dynamo.explain(drafter)(*given)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_the_trial_of_flex_attention_passes_where_it_works(recwarn):
    assert _flex_works("cpu", 64)
    assert not [w for w in recwarn if "flex_attention does not work" in str(w.message)]
