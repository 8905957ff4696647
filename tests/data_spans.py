"""Compares the supervised stretches of a rendering with what the target would have written."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from data.render import ChatFormat
from data.turns import Rendered, encode_conversation
from tests.data_templates import assistant, user

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
