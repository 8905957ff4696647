"""Which tokens of a rendered conversation the target writes: every assistant turn and its end.

A template may trim contents, drop earlier reasoning, insert an empty think block or merge messages,
so a turn cannot be rendered alone and cannot be searched for as text. What is used instead:

* a turn begins where the rendering of the messages before it, with the generation prompt, ends:
  whatever the template writes after that the target has to write itself (an empty think block is
  supervised iff the generation prompt does not hold it already);
* where a message's content lies is found by rendering again with that content replaced by one
  character that occurs nowhere else: what differs is the content;
* a turn ends with the token that ends a plain user/assistant exchange, or another EOS.

Token ids are always those of one call of the tokenizer on the whole rendering.
Legend: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.render import ChatFormat, Message, TemplateRefusal, common_prefix, private_characters
from drafter.errors import UserError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _NotLocated(Exception):
    """Where a turn lies could not be told from the renderings."""


@dataclass
class Rendered:
    """A conversation as tokens.

    Attributes:
        ids: (T,) int32.
        supervised: (T,) bool, the tokens that the target writes.
        turns: assistant turns found.
        open_turns: those of them that no end-of-turn token closes.
    """

    ids: np.ndarray
    supervised: np.ndarray
    turns: int
    open_turns: int


def encode_conversation(
    chat: ChatFormat,
    messages: Sequence[Message],
    tools: Any = None,
    where: str = "this conversation",
) -> Rendered:
    """Returns the tokens of one rendering of the whole conversation, and which the target writes.

    Args:
        chat: the target's format.
        messages: role/content dicts; every message with role "assistant" is supervised.
        tools: passed to the template.
        where: names the row in errors.

    Raises:
        TemplateRefusal: the template raised.
        UserError: a turn could not be located in the rendering.
    """
    text = chat.render(messages, tools=tools)
    ids, offsets = chat.encode(text)
    view = _View(chat, list(messages), tools, text, ids, offsets)
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    spans = list(_spans(view, turns, where))
    supervised = np.zeros(len(ids), dtype=bool)
    for start, end, _ in spans:
        # a token that straddles an edge is not one the target writes there: left out
        supervised |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    open_turns = sum(not closed for _, _, closed in spans)
    return Rendered(np.asarray(ids, dtype=np.int32), supervised, len(turns), open_turns)


def _spans(view: _View, turns: list[int], where: str) -> Iterator[tuple[int, int, bool]]:
    """Yields (first character, end, has an end-of-turn token) of each assistant turn."""
    marked: list[tuple[int, int]] | None = None
    previous_end = 0
    for number, turn in enumerate(turns):
        try:
            start, end, closed = view.locate(turn)
            if not previous_end <= start <= end:
                raise _NotLocated(f"it would lie at characters {start} to {end}")
        except _NotLocated as error:
            # the template's own {% generation %} marks, if it has them: a second witness
            marked = view.marked() if marked is None else marked
            if len(marked) != len(turns):
                raise UserError(
                    f"{where}: cannot tell where message {turn} (role assistant) lies in the chat "
                    f"template's rendering: {error}; the template needs {{% generation %}} marks, "
                    "or give this row tokenised (prompt_ids, response_ids)"
                ) from error
            start, end, closed = view.within(*marked[number])
        previous_end = end
        yield start, end, closed


@dataclass
class _View:
    """One conversation's rendering under examination."""

    chat: ChatFormat
    messages: list[Message]
    tools: Any
    text: str
    ids: list[int]
    offsets: np.ndarray  # (T, 2)

    def locate(self, turn: int) -> tuple[int, int, bool]:
        """Returns (first character, end, closed) of the assistant message at index `turn`."""
        bound = len(self.text)
        first, last = self._content(turn)
        if turn + 1 < len(self.messages):
            next_content = self._content(turn + 1)[0]
            # if the next content changes what stands before this turn, it bounds nothing
            bound = next_content if next_content >= last else bound
        return self._end(self._start(turn, first), last, bound)

    def marked(self) -> list[tuple[int, int]]:
        """Character spans that the template marks as generated; [] if it marks nothing."""
        tokenizer = self.chat.tokenizer
        if not _GENERATION_MARK.search(tokenizer.get_chat_template(tools=self.tools)):
            return []
        encoded = tokenizer.apply_chat_template(
            self.messages,
            tools=self.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.chat.template_kwargs,
        )
        mask = np.asarray([0, *encoded["assistant_masks"], 0])
        edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
        return [(int(self.offsets[a, 0]), int(self.offsets[b - 1, 1])) for a, b in edges]

    def within(self, first: int, last: int) -> tuple[int, int, bool]:
        """What `locate` returns, for a turn that the template marks at characters [first, last)."""
        habits = self.chat.habits
        prompt, least = habits.generation_prompt, max(1, len(habits.header))
        for length in range(len(prompt), least - 1, -1):  # marks may hold the header
            if self.text.startswith(prompt[:length], first):
                first += length
                break
        # marks may leave out the end-of-turn token: look one token further
        following = self.offsets[self.offsets[:, 0] >= last, 1]
        return self._end(first, last, int(following.min(initial=len(self.text))))

    def _start(self, turn: int, first: int) -> int:
        """Where the generation prompt before `turn` ends; its content begins at `first`."""
        if turn > 0:
            try:
                prompted = self.chat.render(self.messages[:turn], prompt=True, tools=self.tools)
            except TemplateRefusal:
                prompted = ""
            if prompted and self.text.startswith(prompted):
                return len(prompted)
        # The template wrote the messages before differently now that more follows them, or writes
        # the generation prompt only in part inside a conversation: look for it before the content.
        habits = self.chat.habits
        low = self._content(turn - 1)[1] if turn > 0 else 0
        low = low if low <= first else 0
        if not habits.header:
            if not self.text.endswith(habits.lead, 0, first):
                raise _NotLocated("what comes before its content is not what a plain exchange has")
            return first - len(habits.lead)
        for length in range(len(habits.generation_prompt), len(habits.header) - 1, -1):
            at = self.text.rfind(habits.generation_prompt[:length], low, first)
            if at >= 0:
                return at + length
        raise _NotLocated(f"{habits.header!r} does not stand before its content")

    def _end(self, start: int, last: int, bound: int) -> tuple[int, int, bool]:
        """The end-of-turn token between `start` and `bound`, else the content's end at `last`."""
        habits = self.chat.habits
        inside = (self.offsets[:, 0] >= start) & (self.offsets[:, 1] <= bound)
        for index in np.flatnonzero(inside):
            if self.ids[index] in habits.closing_ids:
                return start, int(self.offsets[index, 1]), True
        if habits.closing_text and self.text.startswith(habits.closing_text, last):
            return start, last + len(habits.closing_text), True
        return start, last, False

    def _content(self, index: int) -> tuple[int, int]:
        """Characters [first, end) of the rendering that depend on what message `index` says."""
        message = self.messages[index]
        mark = next(mark for mark in private_characters() if mark not in self.text)
        content: Any = mark
        if isinstance(message.get("content"), list):
            content = [{"type": "text", "text": mark}]
        changed = list(self.messages)
        # tool calls count as content: they are written where it is, or instead of it
        changed[index] = {**message, "content": content}
        changed[index].pop("tool_calls", None)
        try:
            other = self.chat.render(changed, tools=self.tools)
        except TemplateRefusal as error:
            raise _NotLocated(f"with another content the template raises: {error}") from error
        if other.count(mark) != 1:
            raise _NotLocated(f"the template shows its content {other.count(mark)} times")
        first = common_prefix(self.text, other)
        room = min(len(self.text), len(other)) - first
        after = common_prefix(self.text[::-1], other[::-1])
        return first, len(self.text) - min(after, room)
