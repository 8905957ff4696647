"""Guards the choice of the mask token (A19): never pad or EOS, always a row of the embedding."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from drafter.errors import UserError
from drafter.mask_token import RESERVED_TOKENS, choose_mask_token
from tests.tiny import NUM_TOKENS, VOCAB_SIZE, tiny_tokenizer


def with_tokens(*names):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def test_an_explicit_id_wins_over_everything():
    tokenizer = with_tokens("<mask>", "<|reserved_special_token_0|>")
    tokenizer.mask_token = "<mask>"
    assert choose_mask_token(tokenizer, VOCAB_SIZE, 17) == 17
    assert choose_mask_token(tokenizer, VOCAB_SIZE, 0) == 0
    assert choose_mask_token(tokenizer, VOCAB_SIZE, VOCAB_SIZE - 1) == VOCAB_SIZE - 1


@pytest.mark.parametrize("explicit", [-1, VOCAB_SIZE, VOCAB_SIZE + 7])
def test_an_explicit_id_out_of_range_is_refused(explicit):
    with pytest.raises(UserError, match=f"{explicit}.*0 to {VOCAB_SIZE - 1}"):
        choose_mask_token(tiny_tokenizer(), VOCAB_SIZE, explicit)


@pytest.mark.parametrize("name", ["pad", "eos"])
def test_an_explicit_pad_or_eos_is_refused(name):
    tokenizer = tiny_tokenizer()
    explicit = getattr(tokenizer, f"{name}_token_id")
    with pytest.raises(UserError, match=f"{name} token"):
        choose_mask_token(tokenizer, VOCAB_SIZE, explicit)


def test_the_tokenizer_s_own_mask_token_comes_next():
    tokenizer = with_tokens("<|reserved_special_token_0|>", "<mask>")
    tokenizer.mask_token = "<mask>"
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == tokenizer.convert_tokens_to_ids("<mask>")


@pytest.mark.parametrize("token", RESERVED_TOKENS)
def test_then_the_reserved_tokens_of_the_families(token):
    tokenizer = with_tokens("<other>", token, "<another>")
    assert choose_mask_token(tokenizer, VOCAB_SIZE) == tokenizer.convert_tokens_to_ids(token)


def test_then_the_first_row_without_a_token():
    assert choose_mask_token(tiny_tokenizer(), VOCAB_SIZE) == NUM_TOKENS


def test_with_nothing_to_choose_the_error_says_how_to():
    with pytest.raises(UserError, match="mask_token_id"):
        choose_mask_token(tiny_tokenizer(), NUM_TOKENS)


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "mask_token"])
def test_pad_and_eos_are_never_chosen_whatever_they_are_called(role):
    # Llama 3 fine-tunes pad with a reserved token; some tokenizers name EOS their mask
    tokenizer = with_tokens("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
    if role == "mask_token":
        tokenizer.mask_token = tokenizer.eos_token
    else:
        setattr(tokenizer, role, "<|reserved_special_token_0|>")
    chosen = choose_mask_token(tokenizer, VOCAB_SIZE)
    assert chosen not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    expected = (
        "<|reserved_special_token_0|>" if role == "mask_token" else ("<|reserved_special_token_1|>")
    )
    assert chosen == tokenizer.convert_tokens_to_ids(expected)


def test_a_reserved_token_without_a_row_is_passed_over():
    tokenizer = with_tokens("<|reserved_special_token_0|>")
    with pytest.raises(UserError, match="mask_token_id"):
        choose_mask_token(tokenizer, NUM_TOKENS)
