"""Shapes of targets, and targets of random weights with them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from drafter.target import Target
from drafter.target_loading import Loaded
from tests.tiny import tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
"""Fields of a transformers config. All are run as Llama: a drafter sees no difference."""


def random_target(
    shapes: dict[str, Any], length: int, device: str | torch.device, dtype: torch.dtype
) -> Target:
    """Returns a target with random weights, made where it runs.

    Args:
        shapes: Fields of its config.
        length: Longest context in tokens.
        device: Where.
        dtype: Of the weights.
    """
    config = LlamaConfig(max_position_embeddings=length, tie_word_embeddings=False, **shapes)
    tokenizer = tiny_tokenizer()
    config.eos_token_id = tokenizer.eos_token_id
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Target(Loaded(model, tokenizer), "random", None)
