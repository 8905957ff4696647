"""Guards both published layouts: what is written, and that others' folders are read alike."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoConfig, OlmoForCausalLM

from drafter.borrowed import check_borrowed
from drafter.config import DrafterConfig
from drafter.errors import UserError
from drafter.evaluation.loading import LoadedDrafter, check_fits, drafter_fingerprint, load_drafter
from drafter.export import export, main
from drafter.model import Drafter
from drafter.target import Target
from tests.tiny import NUM_TOKENS, tiny_target_dir

PUBLISHED = {
    "fc.weight": [32, 64],
    "hidden_norm.weight": [32],
    "norm.weight": [32],
    "layers.0.input_layernorm.weight": [32],
    "layers.0.post_attention_layernorm.weight": [32],
    "layers.0.self_attn.q_proj.weight": [32, 32],
    "layers.0.self_attn.k_proj.weight": [16, 32],
    "layers.0.self_attn.v_proj.weight": [16, 32],
    "layers.0.self_attn.o_proj.weight": [32, 32],
    "layers.0.self_attn.q_norm.weight": [8],
    "layers.0.self_attn.k_norm.weight": [8],
    "layers.0.mlp.gate_proj.weight": [64, 32],
    "layers.0.mlp.up_proj.weight": [64, 32],
    "layers.0.mlp.down_proj.weight": [32, 64],
}
"""By hand, of both layouts: 2 taps, width 32, 4 heads and 2 key/value heads of 8, SwiGLU of 64."""
LAYERS = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
ROPES = {
    "old": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
}


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return tiny_target_dir(tmp_path_factory.mktemp("target"), "llama", tied=False)


@pytest.fixture(scope="module")
def target(target_dir):
    return Target.load(target_dir, dtype="float32")


@pytest.fixture
def loaded(target, target_dir):
    config = DrafterConfig.for_target(
        target.config,
        block_size=4,
        num_layers=1,
        target_layer_ids=(0, 2),
        mask_token_id=NUM_TOKENS,
    )
    drafter = Drafter(config).eval()
    drafter.load_state_dict(weights())
    return LoadedDrafter(
        "ours", drafter, drafter_fingerprint(drafter), target_path=target_dir, target_dtype="auto"
    )


def weights(seed=0):
    """Random tensors of the published names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in PUBLISHED.items()}


def speculators_config(verifier, rope="new"):
    """A config.json of the speculators library, by hand, for K = 4 and layers 0 and 2."""
    greedy = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {**LAYERS, **ROPES[rope]},
        "aux_hidden_state_layer_ids": [1, 3],
        "mask_token_id": NUM_TOKENS,
        "block_size": 4,
        "draft_vocab_size": 256,
        "dtype": "float32",
    }


def zlab_config(rope="new", nested=False):
    """The same drafter's config.json in the z-lab layout, by hand."""
    dflash = {"mask_token_id": NUM_TOKENS, "target_layer_ids": [0, 2]}
    place = dflash if nested else {}
    place["block_size"] = 4
    top = {} if nested else place
    return {
        "architectures": ["DFlashDraftModel"],
        **LAYERS,
        **ROPES[rope],
        **top,
        "num_target_layers": 4,
        "dflash_config": dflash,
        "dtype": "float32",
    }


def write(folder, said, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(drafter, target):
    """Of one block behind nine tokens, which need every layer id, the rope and the mask token."""
    ids = torch.arange(3, 13)[None]
    features = target.features(ids, torch.zeros_like(ids), drafter.config.target_layer_ids)
    block = torch.full((1, 1, drafter.config.block_size), drafter.config.mask_token_id)
    block[..., 0] = ids[0, 9]
    places = torch.arange(9, 9 + drafter.config.block_size)[None, None]
    context = drafter.encode_context(features.hidden_states[:, :9], torch.arange(9)[None])
    return target.head.logits(drafter.denoise(target.embed(block), places, context)).detach()


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_names_shapes_and_dtype_are_the_published_ones(loaded, tmp_path, layout, dtype):
    export(loaded, tmp_path / "out", dtype, layout=layout)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == PUBLISHED
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == dtype
    if layout == "speculators":
        assert said["transformer_layer_config"]["dtype"] == dtype
        assert (
            f"- weights in {dtype}, in the speculators"
            in (tmp_path / "out" / "README.md").read_text()
        )


def test_a_speculators_config_says_what_its_library_reads(loaded, target_dir, tmp_path):
    export(loaded, tmp_path / "out", layout="speculators")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = speculators_config(target_dir)
    for key in wanted.keys() - {"transformer_layer_config", "speculators_config", "dtype"}:
        assert said[key] == wanted[key], key
    how, wanted_how = said["speculators_config"], wanted["speculators_config"]
    assert {**how, "proposal_methods": None} == {**wanted_how, "proposal_methods": None}
    assert how["proposal_methods"][0].items() >= wanted_how["proposal_methods"][0].items()
    assert said["transformer_layer_config"].items() >= LAYERS.items()
    assert said["transformer_layer_config"]["rope_theta"] == 10000.0
    assert said["transformer_layer_config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert said["target_hidden_size"] is None
    assert said["num_target_layers"] == 4
    assert not said["sample_from_anchor"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_round_trip_through_the_other_layout_changes_no_byte(loaded, tmp_path, dtype):
    export(loaded, tmp_path / "a", dtype)
    first = load_drafter(str(tmp_path / "a"))
    export(first, tmp_path / "b", dtype, layout="speculators")
    second = load_drafter(str(tmp_path / "b"))
    layers = json.loads((tmp_path / "b" / "config.json").read_text())["transformer_layer_config"]
    assert "_name_or_path" not in layers
    assert second.fingerprint == first.fingerprint
    assert second.drafter.dtype == getattr(torch, dtype)
    assert second.drafter.config.target_layer_ids == (0, 2)
    export(second, tmp_path / "c", dtype)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.mark.parametrize("rope", ["old", "new"])
@pytest.mark.parametrize("nested", [False, True])
def test_folders_of_others_are_one_drafter_in_both_layouts(
    target, target_dir, tmp_path, rope, nested, capsys
):
    borrowed = {
        "embed_tokens.weight": target.embedding_weight,
        "lm_head.weight": target.head.weight,
        "verifier_lm_head.weight": target.head.weight.clone(),
        "verifier_norm.weight": target.final_norm.weight,
    }
    theirs = write(
        tmp_path / "speculators", speculators_config(target_dir, rope), weights() | borrowed
    )
    ours = write(tmp_path / "zlab", zlab_config(rope, nested), weights())
    found = load_drafter(str(theirs))
    assert capsys.readouterr().out == (
        f"{theirs}: left out embed_tokens.weight, lm_head.weight, verifier_lm_head.weight, "
        "verifier_norm.weight: the same as the target's\n"
    )
    assert found.target_path == target_dir
    assert found.drafter.config.num_target_layers == 4  # of the target's folder
    check_fits(found, target)
    known = load_drafter(str(ours)).drafter
    for config in (found.drafter.config, known.config):
        assert (config.block_size, config.num_target_layers) == (4, 4)
        assert config.rope_parameters["rope_theta"] == 5000.0
        assert config.rope_parameters["factor"] == 2.0
    assert torch.equal(logits(found.drafter, target), logits(known, target))
    plain = write(tmp_path / "plain", zlab_config() | {"rope_parameters": None}, weights())
    assert not torch.equal(
        logits(found.drafter, target), logits(load_drafter(str(plain)).drafter, target)
    )


def test_a_target_that_is_not_here_is_compared_once_it_is_loaded(
    target, tmp_path, capsys, monkeypatch
):
    head = {"lm_head.weight": target.head.weight}
    same = write(tmp_path / "same", speculators_config("someone/model"), weights() | head)
    found = load_drafter(str(same))
    assert "left out lm_head.weight: the target's, compared when it" in capsys.readouterr().out
    assert found.drafter.config.num_target_layers == 0  # the layout does not say
    check_fits(found, target)
    assert found.drafter.config.num_target_layers == 4
    head = {"lm_head.weight": target.head.weight + 1}
    other = write(tmp_path / "other", speculators_config("someone/model"), weights() | head)
    with pytest.raises(UserError, match=r"its lm_head.weight is not the head of .*llama"):
        check_fits(load_drafter(str(other)), target)
    for name, value in (("gguf_file", "q4.gguf"), ("path", "q4.gguf")):  # quantised: other values
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check_fits(load_drafter(str(other)), target)
        assert "its lm_head.weight is not quite the head of" in capsys.readouterr().out
    norm = {"verifier_norm.weight": target.final_norm.weight + 1}
    other = write(tmp_path / "norm", speculators_config("someone/model"), weights() | norm)
    with pytest.raises(UserError, match=r"its verifier_norm.weight is not the final norm of"):
        check_fits(load_drafter(str(other)), target)


@pytest.mark.parametrize("verifier", ["someone/model", None])
@pytest.mark.parametrize("told", [{}, {"num_target_layers": 4}])
@pytest.mark.parametrize(
    ("ids", "said"), [([1, 4], "names layer 3, the target's last"), ([1, 9], "names layer 8, but")]
)
def test_layer_ids_are_held_to_the_target_whoever_told_its_layers(
    target, target_dir, tmp_path, verifier, told, ids, said
):
    config = speculators_config(verifier or target_dir) | told | {"aux_hidden_state_layer_ids": ids}
    with pytest.raises(UserError, match=said):
        check_fits(load_drafter(str(write(tmp_path / "folder", config, weights()))), target)


def test_a_number_of_layers_that_nothing_tells_is_no_part_of_a_drafter(
    target_dir, tmp_path, capsys
):
    away = load_drafter(str(write(tmp_path / "a", speculators_config("some/one"), weights())))
    here = load_drafter(str(write(tmp_path / "b", speculators_config(target_dir), weights())))
    assert (away.drafter.config.num_target_layers, here.drafter.config.num_target_layers) == (0, 4)
    assert away.fingerprint == here.fingerprint
    told = speculators_config("some/one") | {"num_target_layers": 4}
    told_drafter = load_drafter(str(write(tmp_path / "c", told, weights())))
    assert told_drafter.fingerprint == drafter_fingerprint(here.drafter) != here.fingerprint
    with pytest.raises(UserError, match=r"does not tell how many layers .*write num_target_layers"):
        export(away, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
    export(away, tmp_path / "out", "float32", layout="speculators")
    assert "num_target_layers" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_drafter(str(tmp_path / "out")).fingerprint == away.fingerprint


def test_a_target_whose_norm_has_no_weight_fits(target_dir, tmp_path):
    olmo = OlmoConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=None,
        eos_token_id=1,
    )
    OlmoForCausalLM(olmo).save_pretrained(tmp_path / "olmo")
    for file in Path(target_dir).glob("*token*"):
        shutil.copy(file, tmp_path / "olmo")
    olmo_target = Target.load(str(tmp_path / "olmo"), dtype="float32")
    check_fits(load_drafter(str(write(tmp_path / "a", zlab_config(), weights()))), olmo_target)
    own = weights() | {
        "lm_head.weight": olmo_target.head.weight,
        "verifier_norm.weight": torch.ones(32),
    }
    found = load_drafter(str(write(tmp_path / "b", speculators_config("some/one"), own)))
    check_fits(found, olmo_target)


def test_borrowed_tensors_are_compared_as_the_coarser_dtype_has_them(tmp_path, capsys):
    theirs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    save_file({"lm_head.weight": theirs}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": theirs.bfloat16()}, tmp_path / "b.safetensors")
    fine, coarse = ({"lm_head.weight": tmp_path / f"{name}.safetensors"} for name in "ab")
    check_borrowed("ours", fine, {"head": theirs.bfloat16()}, "it")
    check_borrowed("ours", coarse, {"head": theirs}, "it")
    check_borrowed("ours", coarse, {"head": theirs.half()}, "it")
    for borrowed in (fine, coarse):
        with pytest.raises(UserError, match=r"its lm_head.weight is not the head of it"):
            check_borrowed("ours", borrowed, {"head": theirs * 1.02}, "it")
    assert not capsys.readouterr().out
    check_borrowed("ours", fine, {"head": theirs * 1.02}, "it", exact=False)  # of a GGUF file
    assert (
        capsys.readouterr().out == "warning: ours: its lm_head.weight is not quite the head of it\n"
    )
    with pytest.raises(UserError, match="is not the head"):
        check_borrowed("ours", fine, {"head": theirs[:8]}, "it", exact=False)


def test_what_is_left_out_is_told_apart_by_whether_it_was_compared(target, tmp_path, capsys):
    tied = tmp_path / "tied"  # a head under the embedding's name; no final norm
    tied.mkdir()
    save_file({"model.embed_tokens.weight": target.embedding_weight}, tied / "model.safetensors")
    own = {"lm_head.weight": target.embedding_weight, "verifier_norm.weight": torch.ones(32)}
    folder = write(tmp_path / "folder", speculators_config(str(tied)), weights() | own)
    load_drafter(str(folder))
    assert capsys.readouterr().out == (
        f"{folder}: left out lm_head.weight: the same as the target's; "
        "verifier_norm.weight: the target's, compared when it is loaded\n"
    )
    wrong = weights() | {"lm_head.weight": target.embedding_weight + 1}
    folder = write(tmp_path / "wrong", speculators_config(str(tied)), wrong)
    with pytest.raises(UserError, match=r"lm_head.weight is not the head of"):
        load_drafter(str(folder))


def test_weights_of_several_dtypes_are_read_in_the_widest(tmp_path):
    mixed = {name: tensor.bfloat16() for name, tensor in weights().items()}
    mixed["norm.weight"] = weights()["norm.weight"]
    found = load_drafter(str(write(tmp_path / "a", speculators_config("some/one"), mixed))).drafter
    assert found.dtype == torch.float32
    assert all(torch.equal(found.state_dict()[name], mixed[name].float()) for name in mixed)


def test_an_embedding_of_its_own_is_refused_by_name(target, target_dir, tmp_path):
    own = {"embed_tokens.weight": target.embedding_weight * 1.01}
    folder = write(tmp_path / "own", speculators_config(target_dir), weights() | own)
    with pytest.raises(UserError, match=r"embed_tokens.weight is not the embedding of .*llama"):
        load_drafter(str(folder))


OF_LAYERS = {
    "layer_types",
    "attention_sink_bias",
    "is_neox_style",
    "hidden_act",
    "num_hidden_layers",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_local_base_freq",
    *(LAYERS_AGAIN := ("layers.dflash_config", "layers.is_causal")),
}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": True}
OF_LAYERS |= SLIDING.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speculators_model_type": "eagle3"}, "of type 'eagle3'"),
        ({"draft_vocab_size": 257}, "drafts from 257 tokens of the target's 256"),
        ({"draft_vocab_size": 128}, r"missing tensors \['d2t'\]"),
        ({"target_hidden_size": 64}, "for a target of width 64"),
        ({"sample_from_anchor": True}, "predicts a token at the anchor's slot"),
        ({"aux_hidden_state_layer_ids": [0, 3]}, "names 0, the embedding"),
        ({"aux_hidden_state_layer_ids": [1]}, r"fc.weight is \(32, 64\), but .* \(32, 32\)"),
        ({"mask_token_id": None}, "has no mask_token_id"),
        ({"block_size": None}, "has no block_size"),
        ({"block_size": 1}, "block_size is 1"),
        ({"block_size": "many"}, "is not a drafter's folder"),
        ({"transformer_layer_config": None}, "has no transformer_layer_config"),
        ({"layer_types": ["sliding_attention"]}, "of sliding_attention and no window; write"),
        ({"layer_types": ["linear_attention"]}, "of linear_attention; only full_attention and"),
        ({"attention_sink_bias": True}, "has attention sinks"),
        ({"is_neox_style": False}, "has an interleaved rope"),
        ({"layer_types": ["full_attention"] * 2}, "has 2 layer_types for 1 layers"),
        ({"partial_rotary_factor": 0.5}, "has a partial_rotary_factor; only"),
        (
            {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
            "has a partial_rotary_factor; only",
        ),
        (
            {"rope_parameters": {kind: {"rope_theta": 5e3} for kind in ("full_attention", "x")}},
            "has a rope of each layer type",
        ),
        ({**SLIDING, "rope_local_base_freq": 1e4}, "has a rope_local_base_freq of sliding"),
        ({"dflash_config": {"causal": True}}, "tells dflash_config.causal True, which"),
        ({"dflash_config": {"use_swa": True}}, "tells dflash_config.use_swa True"),
        ({"dflash_config": {"swa_window_size": 8}}, "tells dflash_config.swa_window_size 8"),
        ({"dflash_config": {"sample_from_anchor": True}}, "tells dflash_config.sample_from_anch"),
        ({"dflash_config": {"input_embedding_scale": 2.0}}, "dflash_config.input_embedding_sc"),
        ({"input_embedding_scale": 2.0}, "tells input_embedding_scale 2.0"),
        ({"final_logit_softcapping": 30.0}, "tells final_logit_softcapping 30.0"),
        ({"output_multiplier": 0.5}, "tells output_multiplier 0.5"),
        ({"add_swa_attention_sink_bias": True}, "tells add_swa_attention_sink_bias True"),
        ({"is_causal": True}, "tells is_causal True"),
        ({"layers.is_causal": True}, "tells transformer_layer_config.is_causal True"),
        (
            {"layers.dflash_config": {"causal": True}},
            "tells transformer_layer_config.dflash_config.causal True",
        ),
        ({"sliding_window_non_causal": "false"}, "has sliding_window_non_causal 'false'; write"),
        (
            {"speculators_model_type": "dflash2"},
            r"two-tap .* \(attention_conv, mlp_conv\) and cand",
        ),
        ({"selector_rank": 256}, "holds a DFlash 2 drafter"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "has hidden_act 'gelu_pytorch_tanh'; only silu"),
        ({"num_hidden_layers": 2}, r"missing tensors \['layers.1.input"),
        ({"+": "t2d"}, r"unexpected tensors \['t2d'\]"),
        ({"-": "norm.weight"}, r"missing tensors \['norm.weight'\]"),
    ],
)
def test_what_is_not_ours_to_run_is_refused(tmp_path, changes, said):
    config, tensors = copy.deepcopy(speculators_config("someone/model")), weights()
    for key, value in changes.items():
        if key == "+":
            tensors[value] = torch.zeros(256, dtype=torch.bool)
        elif key == "-":
            del tensors[value]
        elif key in OF_LAYERS:
            config["transformer_layer_config"][key.removeprefix("layers.")] = value
        else:
            config[key] = value
    with pytest.raises(UserError, match=said):
        load_drafter(str(write(tmp_path / "folder", config, tensors)))
    if changes.keys() <= OF_LAYERS - {"num_hidden_layers", *LAYERS_AGAIN}:
        zlab = write(tmp_path / "zlab", zlab_config() | changes, tensors)
        with pytest.raises(UserError, match=said):
            load_drafter(str(zlab))


def test_what_asks_for_nothing_is_read(tmp_path):
    neutral = {"causal": False, "use_swa": None, "input_embedding_scale": 1.0}
    said = speculators_config("someone/model") | {"dflash_config": neutral, "is_causal": False}
    said["transformer_layer_config"] |= {"partial_rotary_factor": 1.0, "is_causal": False}
    assert load_drafter(str(write(tmp_path / "folder", said, weights())))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_from_anchor": True}, "predicts a token at the anchor's slot"),
        ({"is_causal": "false"}, "has is_causal 'false'; write true or false"),
        ({"dflash_config.causal": "false"}, "has causal 'false'"),
        ({"dflash_config.use_swa": "false"}, "has use_swa 'false'"),
        ({"dflash_config.sample_from_anchor": True}, "predicts a token at the anchor's slot"),
    ],
)
def test_what_a_zlab_folder_asks_for_in_either_place_is_refused(tmp_path, changes, said):
    config = zlab_config()
    for key, value in changes.items():
        place = config["dflash_config"] if "." in key else config
        place[key.rpartition(".")[2]] = value
    with pytest.raises(UserError, match=said):
        load_drafter(str(write(tmp_path / "folder", config, weights())))


@pytest.mark.parametrize("config", [speculators_config("someone/model"), zlab_config()])
def test_a_mask_embedding_of_its_own_is_refused(tmp_path, config):
    folder = write(tmp_path / "folder", config, weights())
    torch.save(torch.zeros(32), folder / "mask_embedding.pt")
    with pytest.raises(UserError, match=r"a mask embedding of its own \(mask_embedding.pt\)"):
        load_drafter(str(folder))


def test_a_folder_in_pieces_or_without_weights(tmp_path):
    folder = write(tmp_path / "folder", speculators_config("someone/model"), weights())
    whole = load_drafter(str(folder)).fingerprint
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"its model.safetensors can't be read"):
        load_drafter(str(folder))
    names = sorted(tensors)
    parts = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_drafter(str(folder)).fingerprint == whole
    for wrong, said in (("gone.safetensors", "No such file"), ("two.safetensors", "has no fc")):
        index["weight_map"]["fc.weight"] = wrong
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=rf"its model.safetensors can't be read: .*{said}"):
            load_drafter(str(folder))
        with pytest.raises(SystemExit) as stopped:
            main(["check", str(folder)])
        assert stopped.value.code == 1


def test_a_target_that_the_library_could_not_read_is_named(loaded, tmp_path):
    output = tmp_path / "out"
    for path, said in ((None, "is not known"), ("model.gguf", "model.gguf is GGUF")):
        loaded.target_path = path
        with pytest.raises(UserError, match=rf"{said}.*--verifier"):
            export(loaded, output, layout="speculators")
    assert not output.exists()
    export(loaded, output, layout="speculators", verifier="someone/model")
    said = json.loads((output / "config.json").read_text())["speculators_config"]["verifier"]
    assert said == {"name_or_path": "someone/model", "architectures": []}
    with pytest.raises(UserError, match=r"other.gguf is GGUF.*--verifier"):
        export(loaded, output, layout="speculators", verifier="other.gguf")
    with pytest.raises(UserError, match="--verifier is told by the speculators layout only"):
        export(loaded, output, verifier="someone/model")
    loaded.target_path, loaded.target_gguf_file = None, None
    export(loaded, tmp_path / "named", layout="speculators", verifier="someone/model")
    assert load_drafter(str(tmp_path / "named")).target_path == "someone/model"
    with pytest.raises(UserError, match="format 'gguf' is unknown; choose one of zlab, spec"):
        export(loaded, output, layout="gguf")


def test_an_upload_that_fails_is_one_sentence_and_keeps_the_folder(
    loaded, tmp_path, monkeypatch, capsys
):
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            assert {"acceptance.json", "config.yaml", "config.json"} < set(delete_patterns)
            files = sorted(path.name for path in (tmp_path / "out").iterdir())
            calls.append((repo_id, folder_path, files))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("drafter.publish.HfApi", Hub)
    export(loaded, tmp_path / "first")
    words = [str(tmp_path / "first"), "--output", str(tmp_path / "out"), "--push-to-hub", "me/it"]
    main(words)
    assert capsys.readouterr().out.endswith("https://hub/me/it\n")
    main([*words, "--format", "speculators"])
    assert "path of this machine" in capsys.readouterr().out
    del calls[2:]
    files = ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert calls == [("me/it", True), ("me/it", str(tmp_path / "out"), files)]

    def refuse(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.rstrip().splitlines()[-1]  # below progress bars
    assert said.startswith(f"error: {tmp_path / 'out'} is written, but me/it could not be uploaded")
    assert "(no route to host); set HF_TOKEN" in said
    assert load_drafter(str(tmp_path / "out")).fingerprint
