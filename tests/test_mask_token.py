"""Guards the mask token's choice end to end: its order, its refusals, and a row that it can use.

The tokenizers here are saved and loaded again, as a target's is.
"""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from drafter.errors import UserError
from drafter.mask_token import RESERVED_TOKENS, choose_mask_token
from tests.tiny import NUM_TOKENS, VOCAB_SIZE, tiny_target, tiny_tokenizer


def reloaded(folder, reserved=(), **roles):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(reserved), special_tokens=True)
    tokenizer.add_special_tokens(roles)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_each_source_is_used_only_when_those_before_it_have_nothing(tmp_path):
    spare = choose_mask_token(reloaded(tmp_path / "a"), VOCAB_SIZE)
    assert spare == NUM_TOKENS
    tokenizer = reloaded(tmp_path / "b", RESERVED_TOKENS[::-1])
    expected = tokenizer.convert_tokens_to_ids(RESERVED_TOKENS[0])
    assert expected > NUM_TOKENS
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == expected
    tokenizer = reloaded(tmp_path / "c", RESERVED_TOKENS, mask_token="<my mask>")
    expected = tokenizer.convert_tokens_to_ids("<my mask>")
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == expected
    assert choose_mask_token(tokenizer, VOCAB_SIZE, explicit=7) == 7


def test_the_spare_row_comes_after_added_tokens_not_after_the_base_vocabulary(tmp_path):
    tokenizer = reloaded(tmp_path, ["<tool>", "<think>"])
    assert tokenizer.vocab_size == NUM_TOKENS  # without the added ones
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == NUM_TOKENS + 2


def test_a_tokenizer_that_fills_the_embedding_leaves_only_an_explicit_choice(tmp_path):
    tokenizer = reloaded(tmp_path)
    assert choose_mask_token(tokenizer, NUM_TOKENS + 1) == NUM_TOKENS
    with pytest.raises(UserError, match="mask_token_id"):
        choose_mask_token(tokenizer, NUM_TOKENS)
    assert choose_mask_token(tokenizer, NUM_TOKENS, explicit=NUM_TOKENS - 1) == NUM_TOKENS - 1


@pytest.mark.parametrize("explicit", [-1, VOCAB_SIZE])
def test_an_id_without_a_row_is_refused_with_the_range(explicit):
    with pytest.raises(UserError, match=f"0 to {VOCAB_SIZE - 1}"):
        choose_mask_token(tiny_tokenizer(), VOCAB_SIZE, explicit)


@pytest.mark.parametrize("explicit", [0, VOCAB_SIZE - 1])
def test_the_first_and_the_last_row_are_in_range(explicit):
    assert choose_mask_token(tiny_tokenizer(), VOCAB_SIZE, explicit) == explicit


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_a_token_that_ends_or_pads_is_refused_by_its_role(role):
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=role):
        choose_mask_token(tokenizer, VOCAB_SIZE, getattr(tokenizer, f"{role}_token_id"))


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "bos_token"])
def test_a_reserved_token_that_a_fine_tune_gave_a_meaning_is_passed_over(tmp_path, role):
    tokenizer = reloaded(tmp_path, RESERVED_TOKENS[:3], **{role: RESERVED_TOKENS[0]})
    expected = tokenizer.convert_tokens_to_ids(RESERVED_TOKENS[1])
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == expected


def test_the_choice_for_a_loaded_target_has_an_embedding_and_is_no_token(tmp_path):
    target = tiny_target(tmp_path)
    chosen = choose_mask_token(target.tokenizer, target.vocab_size)
    assert chosen not in target.tokenizer.get_vocab().values()
    assert chosen not in target.eos_token_ids
    row = target.model.get_input_embeddings().weight[chosen]
    assert row.isfinite().all()
    assert row.any()
