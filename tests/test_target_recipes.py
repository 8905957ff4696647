"""The recipes of configs/targets, each run on a tiny model with its target's architecture.

Depth, vocabulary, special tokens and their ids, tied or separate head and rope are the target's;
only widths are tiny, so layer ids and mask token are those of the recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from drafter.config import DrafterConfig
from drafter.head import CHUNK_ELEMENTS
from drafter.mask_token import choose_mask_token
from drafter.memory import StepSizes, count_weights, estimate_step
from drafter.module import CHECKPOINT_KEY
from tests.data_files import write_rows
from tests.data_templates import LLAMA3, QWEN3, assistant, user
from tests.runs import ROOT, train
from tests.tiny import tiny_config, tiny_model

# Llama 3.2 as its tokenizer has it: always a system turn, with the day's date.
LLAMA32 = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_TOKENS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    **{f"<|reserved_special_token_{i}|>": 128002 + i for i in range(4)},
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|reserved_special_token_4|>": 128008,
    "<|eot_id|>": 128009,
    "<|reserved_special_token_250|>": 128255,
}
LLAMA32_TOKENS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|reserved_special_token_0|>": 128002,
    "<|reserved_special_token_1|>": 128003,
    "<|finetune_right_pad_id|>": 128004,
    "<|reserved_special_token_2|>": 128005,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
    "<|reserved_special_token_247|>": 128255,
}
QWEN3_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|fim_pad|>": 151662,
    "<think>": 151667,
    "</think>": 151668,
}
LLAMA_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA32_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}


@dataclass(frozen=True)
class Real:
    """A target as config.json and generation_config.json on the hub have it."""

    family: str
    tied: bool
    layers: int
    hidden: int
    mlp: int
    heads: int
    vocabulary: int
    billions: float  # of parameters
    rope: dict
    template: str
    tokens: dict
    eos: tuple


TARGETS = {
    "llama-3-8b-instruct": Real(
        "llama", False, 32, 4096, 14336, 32, 128256, 8.03, LLAMA_ROPE, LLAMA3, LLAMA3_TOKENS,
        (128001, 128009),
    ),
    "llama-3.2-3b-instruct": Real(
        "llama", True, 28, 3072, 8192, 24, 128256, 3.21, LLAMA32_ROPE, LLAMA32, LLAMA32_TOKENS,
        (128001, 128008, 128009),
    ),
    "qwen3-4b": Real(
        "qwen3", True, 36, 2560, 9728, 32, 151936, 4.02, QWEN3_ROPE, QWEN3, QWEN3_TOKENS,
        (151645, 151643),
    ),
    "qwen3-8b": Real(
        "qwen3", False, 36, 4096, 12288, 32, 151936, 8.19, QWEN3_ROPE, QWEN3, QWEN3_TOKENS,
        (151645, 151643),
    ),
}  # fmt: skip
LAYERS = {28: [0, 9, 17, 26], 32: [0, 10, 20, 30], 36: [0, 11, 23, 34]}


def recipe(name):
    path = ROOT / "configs" / "targets" / f"{name}.yaml"
    return path, yaml.safe_load(path.read_text()), path.read_text()


def small_tokenizer(name):
    """One token a byte, and the family's special tokens under their real ids."""
    real = TARGETS[name]
    tokens = real.tokens
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {character: i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab={**words, **tokens}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    thoughts = ("<think>", "</think>")  # added, but not special
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if t[1] == "|"])
    backend.add_tokens([AddedToken(t, normalized=False) for t in tokens if t in thoughts])
    if real.family == "llama":
        bos = "<|begin_of_text|>"
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, tokens[bos])]
                ),
            ]
        )
        named = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    else:
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = real.template
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in tokens} == tokens
    return tokenizer


def tiny_twin(folder, name):
    """Saves a model of the target's architecture but for its widths; returns the tokenizer."""
    real = TARGETS[name]
    llama = real.family == "llama"
    config = tiny_config(
        real.family,
        real.tied,
        num_hidden_layers=real.layers,
        vocab_size=real.vocabulary,
        rope_parameters=real.rope,
        eos_token_id=128009 if llama else 151645,
        bos_token_id=128000 if llama else 151643,
        pad_token_id=None,
        max_position_embeddings=131072 if real.rope is LLAMA32_ROPE else 8192,
    )
    model = tiny_model(config).bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=list(real.eos))
    model.save_pretrained(folder)
    tokenizer = small_tokenizer(name)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_trains_on_a_tiny_model_of_its_architecture(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))  # token files go to ~/.cache
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    tokenizer = tiny_twin(tmp_path / "target", name)
    (tmp_path / "chats").mkdir()
    said = "It is a whole number, of course."
    rows = [
        {"prompt": "a", "prompt_id": "a", "messages": [user(f"What is {i}?"), assistant(said)]}
        for i in range(6)
    ]
    write_rows(tmp_path / "chats" / "train_sft-00000.parquet", rows)
    path, settings, _ = recipe(name)
    overrides = {
        "run_dir": str(tmp_path / "run"),
        "trainer": {
            "accelerator": "cpu",
            "accumulate_grad_batches": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "data": {
            "target": str(tmp_path / "target"),
            "train_data": f"preset:ultrachat={tmp_path / 'chats'}",
            "val_rows": 2,
            "num_anchors": 4,
            "batch_size": 2,
            "num_workers": 0,
        },
        "verification": {
            "before_training": False,
            "prompts_per_set": 1,
            "max_new_tokens": 3,
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    run = train(["fit", "--config", str(path), "--config", str(tmp_path / "overrides.yaml")])

    real, llama = TARGETS[name], TARGETS[name].family == "llama"
    assert run.trainer.global_step == 2
    target = run.datamodule.target
    assert type(target.model).__name__ == ("LlamaForCausalLM" if llama else "Qwen3ForCausalLM")
    assert target.config.tie_word_embeddings is real.tied
    assert set(real.eos) <= set(target.eos_token_ids)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    config = checkpoint[CHECKPOINT_KEY]
    assert config["dflash_config"] == {
        "mask_token_id": settings["model"]["mask_token_id"],
        "target_layer_ids": settings["model"]["target_layer_ids"],
    }
    assert (config["block_size"], config["num_hidden_layers"]) == (16, 4)
    assert config["num_target_layers"] == real.layers
    assert config["rope_parameters"] == real.rope
    assert run.model.drafter.fc.weight.shape == (32, 4 * 32)

    # the answer is supervised to its end, and nothing of the prompt; bos comes once or never
    row = run.datamodule.train_rows[0]
    answer = tokenizer.decode(row.input_ids[row.supervised])
    # Qwen3's template opens an answer without a thought with an empty one
    whole = f"{said}<|eot_id|>" if llama else f"<think>\n\n</think>\n\n{said}<|im_end|>"
    assert answer == whole
    assert list(row.input_ids).count(128000) == (1 if llama else 0)
    assert row.input_ids[0] == (128000 if llama else 151644)


@pytest.mark.parametrize("name", TARGETS)
def test_the_mask_token_is_one_that_no_text_has(name):
    tokenizer, vocabulary = small_tokenizer(name), TARGETS[name].vocabulary
    mask = recipe(name)[1]["model"]["mask_token_id"]
    if TARGETS[name].family == "llama":
        assert tokenizer.convert_ids_to_tokens(mask) == "<|reserved_special_token_0|>"
        assert choose_mask_token(tokenizer, vocabulary) == mask
    else:
        assert mask == max(tokenizer.get_vocab().values()) + 1 < vocabulary
        # another reserved token would be chosen, as the recipe says
        chosen = tokenizer.convert_ids_to_tokens(choose_mask_token(tokenizer, vocabulary))
        assert chosen == "<|fim_pad|>"


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_is_the_paper_s_and_its_comments_hold(name):
    _, settings, text = recipe(name)
    real = TARGETS[name]
    model, data, trainer = (settings[part] for part in ("model", "data", "trainer"))
    assert model["loss"] == {"gamma": 10.0, "alpha_focal": 0.3, "alpha_chain": 40.0}
    assert (model["num_layers"], model["block_size"], model["optimizer"]) == (4, 16, "adamw")
    assert (model["learning_rate"], model["warmup_fraction"]) == (1e-3, 0.015)
    assert (trainer["max_epochs"], trainer["precision"]) == (3, "bf16-mixed")
    spread = [round((real.layers - 2) * i / 3) for i in range(4)]
    assert model["target_layer_ids"] == spread == LAYERS[real.layers]
    for devices, accumulate in ((trainer["devices"], trainer["accumulate_grad_batches"]), (8, 1)):
        assert devices * accumulate * data["batch_size"] == 32

    target = {"llama": LlamaConfig, "qwen3": Qwen3Config}[real.family](
        vocab_size=real.vocabulary,
        hidden_size=real.hidden,
        intermediate_size=real.mlp,
        num_hidden_layers=real.layers,
        num_attention_heads=real.heads,
        num_key_value_heads=8,
        head_dim=128,
    )
    config = DrafterConfig.for_target(
        target,
        block_size=16,
        num_layers=4,
        target_layer_ids=tuple(model["target_layer_ids"]),
        mask_token_id=model["mask_token_id"],
    )
    step = StepSizes(
        rows=data["batch_size"],
        tokens=data["max_length"],
        anchors=data["num_anchors"],
        vocab_size=real.vocabulary,
        chunk_rows=CHUNK_ELEMENTS["cuda"] // real.vocabulary,
        compute_bytes=2,
        feature_bytes=2,
        attention="flex",
    )
    said = " ".join(text.replace("\n#", " ").split())
    assert f"about {estimate_step(config, step).total / 1e9:.1f} GB a step" in said
    assert f"{sum(count_weights(config)) / 1e6:.1f} M parameters" in said
    assert f"{real.billions * 2:.1f} GB of target in bf16" in said
    a_token = len(config.target_layer_ids) * real.hidden * 2
    assert f"{a_token / 1e3:.1f} GB per million tokens kept" in said
    assert re.search(r"Hours: \d\.\d an epoch of 200,000 rows of full length on one H200", said)
