"""Guards that a folder which can't be a target is refused in one sentence, never half loaded.

A tensor that a checkpoint lacks would be random, and a fingerprint that missed a change would let
cached responses of another target pass.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from drafter.errors import UserError
from drafter.target import Target
from tests.tiny import tiny_target_dir, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3"]


def refusal(path, **arguments):
    with pytest.raises(UserError) as error:
        Target.load(str(path), **arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def without(folder, *names):
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    for name in names:
        del weights[name]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("tied", "name"),
    [
        (False, "lm_head.weight"),
        (False, "model.embed_tokens.weight"),
        (True, "model.embed_tokens.weight"),
        (True, "model.layers.2.mlp.up_proj.weight"),
        (True, "model.norm.weight"),
    ],
)
def test_a_deleted_tensor_is_named_and_never_random(tmp_path, family, tied, name):
    folder = tiny_target_dir(tmp_path, family, tied)
    without(folder, name)
    message = refusal(folder)
    # of a tied pair, either name tells the user which matrix is gone
    pair = {"model.embed_tokens.weight", "lm_head.weight"}
    assert any(known in message for known in (pair if tied and name in pair else {name}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_checkpoint_needs_no_head_of_its_own(tmp_path, family):
    folder = tiny_target_dir(tmp_path, family, tied=True)
    assert "lm_head.weight" not in load_file(Path(folder) / "model.safetensors")
    target = Target.load(folder)
    assert torch.equal(target.head.weight, target.model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_untied_head_is_the_checkpoint_s_own(tmp_path, family):
    folder = tiny_target_dir(tmp_path, family, tied=False)
    stored = load_file(Path(folder) / "model.safetensors")["lm_head.weight"]
    target = Target.load(folder)
    assert torch.equal(target.head.weight, stored)
    assert not torch.equal(target.head.weight, target.model.get_input_embeddings().weight)


RECURRENT = [
    "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "granitemoehybrid", "nemotron_h",
    "qwen3_next", "qwen3_5_text", "lfm2", "recurrent_gemma", "rwkv", "falcon_h1", "minimax",
]  # fmt: skip


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_and_hybrid_models_are_refused_from_their_config_alone(tmp_path, model_type):
    # LFM2's convolutions are named by its layer kinds alone
    extra = {"layer_types": ["conv", "full_attention"] * 16} if model_type == "lfm2" else {}
    try:
        config = AutoConfig.for_model(model_type, **extra)
    except ValueError:
        pytest.skip("this transformers does not have it")
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "attention layers" in refusal(tmp_path)


def test_one_linear_layer_among_attention_layers_is_enough_to_refuse(tmp_path):
    folder = Path(tiny_target_dir(tmp_path, "qwen3"))
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * 3 + ["linear_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "attention" in refusal(folder)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "deep/er/nowhere"])
def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path, name):
    message = refusal(tmp_path / name)
    assert "not there" in message
    assert name in message


def test_a_gguf_file_that_the_folder_lacks_is_named(tmp_path):
    assert "model.Q4.gguf" in refusal(tmp_path, gguf_file="model.Q4.gguf")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lost_a_file_is_refused(tmp_path, lost):
    folder = Path(tiny_target_dir(tmp_path))
    (folder / lost).unlink()
    assert str(folder) in refusal(folder)


def test_a_dtype_that_does_not_exist_is_refused(tmp_path):
    assert "float32" in refusal(tiny_target_dir(tmp_path), dtype="fp8")


def test_the_fingerprint_tells_another_target_from_the_same_one(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    first = Target.load(str(folder)).fingerprint
    assert Target.load(str(folder)).fingerprint == first
    copy = Path(tiny_target_dir(tmp_path / "elsewhere"))
    assert Target.load(str(copy)).fingerprint == first

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(copy)
    assert Target.load(str(copy)).fingerprint != first

    other = Path(tiny_target_dir(tmp_path / "third"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-3  # an entry that is sampled
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert Target.load(str(other)).fingerprint != first
    assert Target.load(tiny_target_dir(tmp_path, seed=1)).fingerprint != first
