"""Guards published layers: windows and causal blocks that training, loop or replay see otherwise.

Slow twin: `naive_states`, one query at a time over a list of the positions that it may see.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from drafter.attention import LayerAttention, build_visibilities
from drafter.blocks import DraftBatch, build_blocks
from drafter.config import DrafterConfig
from drafter.decoding import CachedDrafter, CachedTarget, decode_speculatively
from drafter.errors import UserError
from drafter.evaluation.loading import LoadedDrafter, check_fits, drafter_fingerprint, load_drafter
from drafter.evaluation.measure import decode_prompt, replay_trajectory
from drafter.evaluation.trajectories import EvalPrompt, Trajectory, TrajectorySettings
from drafter.export import export
from drafter.export_check import check_export, read_config
from drafter.model import Drafter, for_products, rotate
from drafter.module import CHECKPOINT_KEY, DrafterModule
from drafter.sampling import GREEDY, Sampling
from drafter.search import Search
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import NUM_TOKENS, tiny_config, tiny_model, tiny_target_dir, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

WINDOW, K, NEW = 7, 5, 30
MIXED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "use_sliding_window": True,
}
KINDS = {
    "mixed": MIXED,  # as z-lab's drafters for Qwen3.6 and Gemma 4
    "mixed, not causal": {**MIXED, "is_causal": False},
    "sliding, not causal": {**MIXED, "layer_types": ["sliding_attention"] * 2, "is_causal": False},
    "full, causal": {"is_causal": True},
}
SEEN = {
    "mixed": [(WINDOW, True), (None, False)],
    "mixed, not causal": [(WINDOW, False), (None, False)],
    "sliding, not causal": [(WINDOW, False)] * 2,
    "full, causal": [(None, True)] * 2,
}
PROMPTS = [[5, 9, 3], [7, 1, 2, 8, 8, 4, 30, 11, 60, 61, 7, 12, 13], [100, 4, 2, 17]]
"""With their responses all cross the window's edge; the second does from the start."""


@pytest.fixture(scope="module")
def target():
    model = tiny_model(tiny_config("llama", tied=False))
    return Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.fixture(scope="module")
def drafters(target):
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)]
    options = {"block_size": K, "new_tokens": NEW, "num_layers": 2, "steps": 10}
    return {
        kind: overfitted_drafter(target, prompts, **options, **fields)
        for kind, fields in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def drafter(drafters, request):
    return drafters[request.param]


def naive_states(drafter, features_SW, embeds_KD, kinds):
    """(K, D) states of one block behind S features."""
    length, slots = len(features_SW), len(embeds_KD)
    context = drafter.encode_context(features_SW[None], torch.arange(length)[None])
    rope = drafter._rope(length + torch.arange(slots)[None])
    x = embeds_KD[None]
    for layer, keys, values, (window, causal) in zip(
        drafter.layers, context.keys, context.values, kinds, strict=True
    ):
        attention = layer.self_attn
        normed = for_products(layer.input_layernorm(x))
        query = rotate(attention.q_norm(attention._heads(attention.q_proj(normed))), rope)[0]
        own_keys, own_values = attention.keys_values(normed, rope)
        keys = torch.cat((keys, own_keys), 2)[0].repeat_interleave(2, 0)
        values = torch.cat((values, own_values), 2)[0].repeat_interleave(2, 0)
        out = []
        for slot in range(slots):
            here = length + slot
            seen = [p for p in range(length + slots) if not (causal and p > here)]
            seen = [p for p in seen if window is None or abs(here - p) < window]
            scores = (query[:, slot, None] * keys[:, seen]).sum(-1) / math.sqrt(query.shape[-1])
            out.append((scores.softmax(-1)[..., None] * values[:, seen]).sum(1).flatten())
        x = x + attention.o_proj(torch.stack(out))[None]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return drafter.norm(x)[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_training_and_decoding_are_the_naive_twin_on_both_sides_of_the_window(drafters, kind):
    drafter = drafters[kind]
    assert list(drafter.config.layer_attention) == SEEN[kind]
    torch.manual_seed(1)
    # a packed row: a document of 20 and one of 12 that begins anew at position 0
    states, starts = torch.randn(1, 32, 64), [0] * 20 + [20] * 12
    documents = torch.tensor([[0] * 20 + [1] * 12])
    positions = torch.tensor([[p - starts[p] for p in range(32)]])
    anchors = torch.tensor([[1, WINDOW - 1, WINDOW, WINDOW + 1, 19, 21, 20 + WINDOW, 31]])
    slots = positions.gather(1, anchors)[..., None] + torch.arange(K)
    embeds = torch.randn(1, anchors.shape[1], K, 32)
    layers = drafter.config.layer_attention
    by_kind = {
        how: drafter(
            states,
            positions,
            embeds,
            slots,
            build_visibilities(layers, anchors, documents, K, how, head_dim=8),
        )[0]
        for how in ("sdpa", "flex")
    }
    for place, anchor in enumerate(anchors[0].tolist()):
        own = states[0, starts[anchor] : anchor]
        expected = naive_states(drafter, own, embeds[0, place], SEEN[kind])
        context = None
        for piece in torch.arange(len(own)).split(3):  # as a loop commits them
            context = drafter.encode_context(own[None, piece], piece[None], context)
        decoded = drafter.denoise(
            embeds[:, place : place + 1], slots[:, place : place + 1], context
        )
        for found in (by_kind["sdpa"][place], by_kind["flex"][place], decoded[0, 0]):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sliding_drafter_is_blind_behind_its_window_and_not_a_position_before(drafters):
    drafter = drafters["sliding, not causal"]
    length, states = 20, torch.randn(1, 20, 64)
    embeds, slots = torch.randn(1, 1, K, 32), (20 + torch.arange(K)).view(1, 1, K)

    def run(features):
        context = drafter.encode_context(features, torch.arange(length)[None])
        return drafter.denoise(embeds, slots, context)

    base = run(states)
    for place, moved in ((length - WINDOW, False), (length - WINDOW + 1, True)):
        other = states.clone()
        other[:, place] += 1.0
        assert torch.equal(run(other), base) != moved


@pytest.mark.parametrize(
    ("search", "sampling"),
    [(None, GREEDY), (Search("tree", budget=12), Sampling(1.0, top_k=8))],
    ids=["plain", "tree, sampled"],
)
@torch.no_grad()
def test_replay_walks_the_rounds_of_the_loop(target, drafter, search, sampling):
    settings, lengths = TrajectorySettings(NEW, sampling, seed=4), []
    for place, ids in enumerate(PROMPTS):
        prompt = EvalPrompt("s", place, ids)
        found = decode_prompt(drafter, target, ids, settings, key=prompt.key, search=search)
        if sampling.greedy:
            assert found.ids == target.generate([ids], NEW)[0].ids
        row = torch.tensor([[*ids, *found.ids]])
        states = target.features(row, torch.zeros_like(row), drafter.config.target_layer_ids)
        trajectory = Trajectory(prompt, found.ids, [], found.finished)
        replayed = replay_trajectory(
            drafter, target, trajectory, settings, states.hidden_states, search=search
        )
        assert list(replayed.counts.round_lengths) == found.round_lengths
        lengths += found.round_lengths
    assert max(lengths) > 1


@pytest.mark.parametrize("kind", ["mixed", "sliding, not causal"])
@torch.no_grad()
def test_decoding_on_fixed_shapes_is_the_loop(target, drafters, kind):
    drafter = drafters[kind]
    length = max(map(len, PROMPTS)) + NEW
    found = StaticDecoder(target, drafter, rows=2, length=length).decode(
        PROMPTS, max_new_tokens=NEW, eos_token_ids=()
    )
    for ours, ids in zip(found, PROMPTS, strict=True):
        engine = CachedTarget(target, drafter.config.target_layer_ids)
        looped = decode_speculatively(
            engine,
            CachedDrafter(drafter, target, engine),
            ids,
            max_new_tokens=NEW,
            eos_token_ids=(),
        )
        assert (ours.ids, ours.rounds, ours.drafts) == (looped.ids, looped.rounds, looped.drafts)


# ---------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return tiny_target_dir(tmp_path_factory.mktemp("target"), "llama", tied=False)


def loaded(drafter, target_dir):
    return LoadedDrafter("d", drafter, drafter_fingerprint(drafter), target_path=target_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_keep_how_layers_see(drafters, target_dir, tmp_path, kind):
    drafter = drafters[kind]
    export(loaded(drafter, target_dir), tmp_path / "a", "float32")
    first = load_drafter(str(tmp_path / "a"))
    assert first.drafter.config.layer_attention == drafter.config.layer_attention
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said.items() >= KINDS[kind].items()
    if kind == "full, causal":
        with pytest.raises(UserError, match="no place for full-attention layers that are causal"):
            export(first, tmp_path / "b", layout="speculators")
    else:
        export(first, tmp_path / "b", "float32", layout="speculators")
        told = json.loads((tmp_path / "b" / "config.json").read_text())
        assert told["sliding_window_non_causal"] == ("not causal" in kind)
        assert "is_causal" not in told["transformer_layer_config"]
        second = load_drafter(str(tmp_path / "b"))
        assert second.fingerprint == first.fingerprint
        export(second, tmp_path / "c", "float32")
        again = (tmp_path / "c" / "config.json").read_bytes()
        assert again == (tmp_path / "a" / "config.json").read_bytes()
    for folder in tmp_path.iterdir():
        assert not [one for one in check_export(folder, read_config(folder)) if one.fault]


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"layer_types": None}, [(None, False)] * 2),
        ({"layer_types": None, "max_window_layers": 1}, [(None, False), (WINDOW, True)]),
        ({"dflash_config": {"causal": False}}, [(WINDOW, False), (None, False)]),
        ({"dflash_config": {"causal": True}}, [(WINDOW, True), (None, True)]),
        ({"is_causal": False, "dflash_config": {"causal": True}}, SEEN["mixed, not causal"]),
        (
            {"layer_types": ["full_attention"] * 2, "dflash_config": {"use_swa": True}},
            [(WINDOW, False)] * 2,
        ),
        ({"dflash_config": {"use_swa": True, "swa_window_size": 3}}, [(3, True), (None, False)]),
        (
            {
                "layer_types": None,
                "use_sliding_window": False,
                "dflash_config": {"use_swa": True, "swa_window_size": 3, "causal": True},
            },
            [(3, True)] * 2,
        ),
    ],
)
def test_layers_see_what_vllm_makes_of_a_config(fields, seen):
    config = DrafterConfig(num_hidden_layers=2, **MIXED | fields)
    assert list(config.layer_attention) == [LayerAttention(*one) for one in seen]
    again = DrafterConfig.from_dict(config.to_dict())
    assert again.layer_attention == config.layer_attention


def test_further_training_keeps_the_layers_and_sees_as_they_do(drafters, target, tmp_path):
    drafters["mixed, not causal"].save_pretrained(tmp_path / "start")
    module = DrafterModule(block_size=K, init_from=str(tmp_path / "start"))
    module.attach(target)
    ids = torch.arange(5, 45)[None]
    documents = torch.zeros_like(ids)
    batch = DraftBatch(
        input_ids=ids,
        supervised=torch.arange(40)[None] >= 4,
        document_ids=documents,
        positions=torch.arange(40)[None],
        anchors=torch.tensor([[5, 20, 34]]),
        sample_ids=torch.zeros(1, dtype=torch.long),
        hidden_states=target.features(ids, documents, (0, 2)).hidden_states,
    )
    scores = module(batch)
    blocks = build_blocks(batch, K, NUM_TOKENS)
    embeds = target.embed(blocks.input_ids)[0]
    for place, anchor in enumerate(batch.anchors[0].tolist()):
        with torch.no_grad():
            states = naive_states(
                module.drafter,
                batch.hidden_states[0, :anchor],
                embeds[place],
                SEEN["mixed, not causal"],
            )
        log_probs = target.head.logits(states[1:]).log_softmax(-1)
        expected = log_probs.gather(-1, blocks.labels[0, place][:, None])[:, 0]
        torch.testing.assert_close(scores.log_prob[place].detach(), expected, atol=1e-4, rtol=1e-4)
    scores.log_prob.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.drafter.parameters())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    saved = DrafterConfig.from_dict(checkpoint[CHECKPOINT_KEY])
    assert list(saved.layer_attention) == SEEN["mixed, not causal"]


# ---------------------------------------------------------------------- scales, and what is refused


def of(target, **fields):
    dflash = {"mask_token_id": NUM_TOKENS, "target_layer_ids": [0, 2], **fields}
    config = DrafterConfig.for_target(
        target.config, block_size=K, num_layers=1, target_layer_ids=(0, 2), mask_token_id=NUM_TOKENS
    )
    return Drafter(DrafterConfig.from_dict(config.to_dict() | {"dflash_config": dflash})).eval()


@torch.no_grad()
def test_scales_are_the_targets_or_are_refused(target, tmp_path):
    gemma = Target.load(
        tiny_target_dir(tmp_path, "gemma3", final_logit_softcapping=3.0), dtype="float32"
    )
    assert gemma.embedding_scale == pytest.approx(32**0.5)
    halved = copy.copy(gemma)
    halved.head = dataclasses.replace(gemma.head, scale=0.5)
    for theirs, told in (
        (gemma, {}),
        (gemma, {"final_logit_softcapping": 3.0}),
        (target, {"output_multiplier": 1.0, "final_logit_softcapping": None}),
        (target, {"input_embedding_scale": 2.0}),
        (halved, {"final_logit_softcapping": 3.0}),  # which says nothing of the factor
        (halved, {"output_multiplier": 0.5}),
        (halved, {}),
    ):
        check_fits(loaded(of(theirs, **told), ""), theirs)
    for theirs, told, said in (
        (target, {"final_logit_softcapping": 3.0}, "capping 3, not 0 as the head of .* has"),
        (gemma, {"final_logit_softcapping": 30.0}, "softcapping 30, not 3 as"),
        (halved, {"final_logit_softcapping": 0.0}, "has final_logit_softcapping 0, not 3 as"),
        (gemma, {"output_multiplier": 0.5}, "has output_multiplier 0.5, not 1 as"),
        (gemma, {"input_embedding_scale": 2.0}, "public code differs"),
    ):
        with pytest.raises(UserError, match=said):
            check_fits(loaded(of(theirs, **told), ""), theirs)


@torch.no_grad()
def test_a_drafters_own_factor_on_embeddings_is_kept(target, target_dir, tmp_path):
    scaled, plain = of(target, input_embedding_scale=2.0), of(target)
    plain.load_state_dict(scaled.state_dict())
    context = plain.encode_context(torch.randn(1, 9, 64), torch.arange(9)[None])
    embeds, slots = torch.randn(1, 1, K, 32), (9 + torch.arange(K)).view(1, 1, K)
    assert torch.equal(
        scaled.denoise(embeds, slots, context), plain.denoise(2 * embeds, slots, context)
    )
    export(loaded(scaled, target_dir), tmp_path / "a")
    assert load_drafter(str(tmp_path / "a")).drafter.config.embedding_scale == 2.0
    with pytest.raises(UserError, match="no place for input_embedding_scale 2"):
        export(loaded(scaled, target_dir), tmp_path / "b", layout="speculators")


def test_told_logits_are_kept_in_both_layouts(target, target_dir, tmp_path):
    told = {"final_logit_softcapping": 3.0, "output_multiplier": 0.5}
    export(loaded(of(target, **told), target_dir), tmp_path / "a", layout="speculators")
    found = load_drafter(str(tmp_path / "a"))
    assert found.drafter.config.told_logits == told
    export(found, tmp_path / "b")
    assert load_drafter(str(tmp_path / "b")).drafter.config.told_logits == told


def test_dflash_2_is_refused_by_name(target, target_dir, tmp_path):
    export(loaded(of(target), target_dir), tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    said = json.loads(file.read_text())
    modules = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256}
    for changes in (
        {"architectures": ["DFlash2DraftModel"]},
        {"dflash_config": said["dflash_config"] | modules},
    ):
        file.write_text(json.dumps(said | changes))
        with pytest.raises(UserError, match=r"\(attention_conv, mlp_conv\) and candidate_selector"):
            load_drafter(str(tmp_path / "a"))
