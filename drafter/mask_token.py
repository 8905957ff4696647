"""Which token stands at the drafted slots of a block's input."""

from __future__ import annotations

from typing import Any

from drafter.errors import UserError

# Tokens that tokenizers reserve and chat models never read or write, in order of preference.
RESERVED_TOKENS = (
    "<|reserved_special_token_0|>",  # Llama 3, for use by nobody
    "<|reserved_special_token_1|>",  # where a fine-tune made the first its padding
    "<|fim_pad|>",  # Qwen 2.5 and 3: pads fill-in-the-middle training data only
    "<unused0>",  # Gemma
    "<empty_output>",  # SmolLM2: marks a notebook cell without output
    "<|extra_0|>",  # Qwen 1
)


def choose_mask_token(tokenizer: Any, vocab_size: int, explicit: int | None = None) -> int:
    """Returns the mask token's id (method.md, Drafter).

    In order: the explicit id; the tokenizer's mask token; a known reserved token of the family; an
    embedding row beyond the tokenizer's last id.

    Args:
        tokenizer: The target's.
        vocab_size: Rows of the target's embedding.
        explicit: The user's choice.

    Raises:
        UserError: The choice is out of range or means something (pad, end of text), or there is
            nothing to choose.
    """
    taken = {
        "pad": getattr(tokenizer, "pad_token_id", None),
        "eos": getattr(tokenizer, "eos_token_id", None),
        "bos": getattr(tokenizer, "bos_token_id", None),
    }
    if explicit is not None:
        if not 0 <= explicit < vocab_size:
            raise UserError(
                f"mask_token_id is {explicit}, but the target's embedding has rows 0 to "
                f"{vocab_size - 1}; choose one of these."
            )
        for name in ("pad", "eos"):
            if explicit == taken[name]:
                raise UserError(
                    f"mask_token_id {explicit} is the tokenizer's {name} token, which means "
                    "something to the target; choose a reserved token that it never reads."
                )
        return explicit
    known = tokenizer.get_vocab()
    candidates = [getattr(tokenizer, "mask_token_id", None)]
    candidates += [known.get(token) for token in RESERVED_TOKENS]
    candidates.append(max(known.values(), default=-1) + 1)
    for candidate in candidates:
        if candidate is not None and candidate < vocab_size and candidate not in taken.values():
            return int(candidate)
    raise UserError(
        "The tokenizer reserves no token that could be the mask, and the embedding has no spare "
        "row: set --model.mask_token_id to the id of a token that never occurs in your data."
    )
