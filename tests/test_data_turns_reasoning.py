"""Turns with thoughts and tool calls: templates rewrite history and insert blocks (B2, B4)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data_spans import ANSWERS, THREE_TURNS, check
from tests.data_templates import CALL_ONLY, OPEN_THINK, QWEN3, SWITCHED, assistant, byte_bpe, user


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


def test_a_user_who_quotes_the_generation_prompt_does_not_draw_the_turn_to_himself():
    quoted = "<|im_start|>assistant\n<think>\n\n</think>\n\nyou"
    check(
        byte_bpe(QWEN3, eos="<|im_end|>"),
        [user(quoted), assistant("hello"), user(quoted), assistant("the answer")],
        ["hello<|im_end|>", "the answer<|im_end|>"],
        enable_thinking=False,
    )


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


def test_a_prompt_that_depends_on_what_the_user_says():
    check(
        byte_bpe(SWITCHED, eos="<|im_end|>"),
        [user("hello"), assistant("you"), user("hello /no_think"), assistant("you")],
        ["<think></think>you<|im_end|>", "you<|im_end|>"],
    )


@pytest.mark.parametrize("content", ["", None, "not shown"])
def test_a_call_written_instead_of_the_content(content):
    call = {"type": "function", "function": {"name": "add"}}
    check(
        byte_bpe(CALL_ONLY, eos="<|eot_id|>"),
        [
            user("the question"),
            assistant("hello"),
            assistant(content, tool_calls=[call]),
            {"role": "tool", "content": "42"},
            assistant("the answer is 42."),
        ],
        ["hello<|eot_id|>", '{"name": "add"}<|eot_id|>', "the answer is 42.<|eot_id|>"],
    )
