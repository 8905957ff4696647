"""The shapes a row may have: chat messages, ShareGPT, prompt/response pairs, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.render import Message
from drafter.errors import UserError

if TYPE_CHECKING:
    from data.sources import SourceRow

MESSAGE_KEYS = ("messages", "conversations", "conversation")
PROMPT_KEYS = ("prompt", "instruction", "question", "query", "problem")
RESPONSE_KEYS = ("response", "completion", "answer", "output", "solution")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Role/content messages, and the tools the template is told of."""

    messages: list[Message]
    tools: Any = None

    @property
    def answers(self) -> list[Message]:
        """The assistant turns."""
        return [message for message in self.messages if message["role"] == "assistant"]

    @property
    def says_nothing(self) -> bool:
        """Whether there are assistant turns and every one of them is empty."""
        return bool(self.answers) and all(map(_says_nothing, self.answers))


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenised already."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def says_nothing(self) -> bool:
        """Whether the response is empty."""
        return not self.response_ids


def parse(row: SourceRow) -> Conversation | Tokens:
    """Returns what the row says, whichever shape it has.

    Raises:
        UserError: the row has none of the known shapes, or a malformed one; names the row.
    """
    data, where = row.data, row.where
    if data.get("response_ids") is not None:
        return Tokens(
            token_ids(data.get("prompt_ids", []), f"{where}: prompt_ids"),
            token_ids(data["response_ids"], f"{where}: response_ids"),
        )
    messages = _messages(data, where)
    if messages is None:
        messages = [*prompt_messages(data, where), *_response(data, where)]
    return Conversation(_with_system(data, messages), data.get("tools"))


def prompt_messages(data: dict[str, Any], where: str) -> list[Message]:
    """Returns the messages of a row's prompt field: a text, or a list of messages.

    Raises:
        UserError: there is no such field, or it is neither.
    """
    key = _present(data, PROMPT_KEYS)
    if key is None:
        raise UserError(
            f"{where}: cannot tell what the row holds (fields: {', '.join(data) or 'none'}); "
            f"expected one of {', '.join(MESSAGE_KEYS)}; or a prompt ({', '.join(PROMPT_KEYS)}) "
            f"with a response ({', '.join(RESPONSE_KEYS)}); or prompt_ids and response_ids"
        )
    value = data[key]
    if key == "instruction" and data.get("input"):  # Alpaca's second half of the prompt
        value = f"{value}\n\n{data['input']}"
    return _text_or_messages(value, "user", f"{where}: {key}")


def row_messages(data: dict[str, Any], where: str) -> list[Message] | None:
    """Returns the row's message list with its system text, or None if it has no such field.

    Raises:
        UserError: the field is malformed.
    """
    messages = _messages(data, where)
    return None if messages is None else _with_system(data, messages)


def token_ids(value: Any, where: str) -> list[int]:
    """Returns `value` as a list of ids.

    Raises:
        UserError: it is not a list of whole numbers >= 0.
    """
    good = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
    if not good:
        raise UserError(f"{where} must be a list of token ids (integers from 0), not {value!r:.60}")
    return list(value)


def check_range(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """Raises UserError if an id is not a row of the target's embedding."""
    highest = int(np.max(ids, initial=-1))
    if highest >= vocab_size:
        raise UserError(
            f"{where}: token id {highest} is outside the target's vocabulary of {vocab_size}; the "
            "row was tokenised for another model"
        )


def _messages(data: dict[str, Any], where: str) -> list[Message] | None:
    key = _present(data, MESSAGE_KEYS)
    if key is None:
        return None
    value = data[key]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key} must be a list of messages, not {value!r:.60}")
    return [_message(turn, f"{where}: {key}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a message must be an object, not {turn!r:.60}")
    # readers of columnar files fill absent fields with None
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message:
        role, content = message.pop("from"), message.pop("value", "")
        if role not in _ROLES:
            raise UserError(f"{where}: unknown speaker {role!r}; known are {', '.join(_ROLES)}")
        message = {"role": role, "content": content, **message}
    if not isinstance(message.get("role"), str):
        raise UserError(
            f"{where}: a message needs role and content (or from and value), not {', '.join(turn)}"
        )
    message["role"] = _ROLES.get(message["role"], message["role"])
    if "content" not in message and not message.get("tool_calls"):
        message["content"] = ""
    if not isinstance(message.get("content", ""), (str, list)):
        raise UserError(f"{where}: content must be text, not {message['content']!r:.60}")
    return message


def _response(data: dict[str, Any], where: str) -> list[Message]:
    key = next((key for key in RESPONSE_KEYS if key in data), None)
    if key is None:
        return []  # real sets have such rows: left out and named, not the end of the run
    value = "" if data[key] is None else data[key]
    return _text_or_messages(value, "assistant", f"{where}: {key}")


def _text_or_messages(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return [_message(turn, f"{where}[{i}]") for i, turn in enumerate(value)]
    raise UserError(f"{where} must be text or a list of messages, not {value!r:.60}")


def _with_system(data: dict[str, Any], messages: list[Message]) -> list[Message]:
    system = data.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _present(data: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if data.get(key) is not None), None)


def _says_nothing(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    rest = (message.get(key) for key in ("tool_calls", "reasoning_content", "thinking"))
    return not (content or "").strip() and not any(rest)
