"""Tiny random targets (Llama, Qwen3, Gemma-3) in a temporary folder, with a tokenizer to match.

Weights are drawn at 0.2 rather than 0.02, and norms away from 1: argmax is then far from a tie, and
a state taken before a norm differs from one taken after it. The final norm has random signs, or a
tied model would repeat its input.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

if TYPE_CHECKING:
    from drafter.target import Target

Family = Literal["llama", "qwen3", "gemma3"]
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}

NUM_TOKENS = 200  # rows 200 to 255 of the embedding have no token
VOCAB_SIZE = 256
NUM_LAYERS = 4
HIDDEN_SIZE = 32
SLIDING_WINDOW = 16

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALPHABET = [chr(i) for i in range(32, 127)] + ["\n", "\t"]
_CORPUS = [
    "user\nassistant\nsystem\nWhat is the sum of two and three? The answer is five.",
    "Tell me about the weather in the north. It is cold there, and the wind is strong.",
    "Write a list of the things that you can see from the window of this room, and count them.",
    "The quick brown fox jumps over the lazy dog while the other animals are sleeping.",
]


@lru_cache
def _tokenizer_json() -> str:
    backend = Tokenizer(models.BPE(unk_token="<|unk|>"))
    backend.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=_ALPHABET,
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 2, trainer)
    assert backend.get_vocab_size() == NUM_TOKENS
    return backend.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 200 tokens: all printable ASCII, newline, tab, a ChatML-like template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(family: Family = "llama", tied: bool = True, **overrides: Any) -> Any:
    """The config of a tiny target; `overrides` are fields of the family's config class."""
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    layers = overrides.get("num_hidden_layers", NUM_LAYERS)
    if family == "gemma3":
        fields["sliding_window"] = SLIDING_WINDOW
        fields["query_pre_attn_scalar"] = 8
        kinds = ("sliding_attention", "full_attention")
        fields["layer_types"] = [kinds[i % 2] for i in range(layers)]
    return CONFIGS[family](**{**fields, **overrides})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A random causal LM of this config, fp32, eval mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name == "model.norm.weight":
                    starts_at = parameter[0].item()  # 1, or 0 where the norm adds 1 (Gemma)
                    parameter.copy_(torch.randn_like(parameter) + starts_at - 1)
                elif "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_target_dir(
    tmp_path: Path | str,
    family: Family = "llama",
    tied: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> str:
    """Saves a tiny target with its tokenizer under `tmp_path`; returns the folder."""
    folder = Path(tmp_path) / f"{family}-{'tied' if tied else 'untied'}-{seed}"
    tiny_model(tiny_config(family, tied, **overrides), seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_target(
    tmp_path: Path | str,
    family: Family = "llama",
    tied: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Target:
    """A tiny target in fp32 on the CPU, saved and loaded as a user's would be."""
    from drafter.target import Target

    return Target.load(tiny_target_dir(tmp_path, family, tied, seed, **overrides), dtype="float32")
