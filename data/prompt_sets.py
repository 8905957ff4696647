"""Files of prompts: the benchmarks' shape, our own, or tokenised already; one named set a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.formats import check_range, prompt_messages, row_messages, token_ids
from data.render import ChatFormat, Message, TemplateRefusal
from data.sources import Source, read_file
from drafter.errors import UserError
from drafter.evaluation.trajectories import EvalPrompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt(EvalPrompt):
    """A prompt to measure with or to answer; what `EvalPrompt` holds, and its words.

    Attributes:
        text: the rendering that `ids` are the tokens of, generation prompt included.
        turns: what the user says in each turn. Only the first is rendered so far: a later one needs
            the target's answer to the one before.
    """

    text: str = ""
    turns: tuple[str, ...] = ()


def load_prompts(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Returns the prompts of the files, set by set, in file order.

    A row is one of {"turns": [...]}, {"prompt": ...}, {"messages": [...]} (used up to its first
    assistant turn) or {"prompt_ids": [...]}, which may come with "response_ids".

    Args:
        source: files (json, jsonl, parquet; plain or .gz), a folder of them, or a list. A file's
            set is named by its name up to the first dot.
        tokenizer: the target's; text is rendered with its template and the generation prompt.
        vocab_size: rows of the target's embedding, to check ids against; None checks nothing.
        skip: rows of each file to pass over first. Prompt ids are rows' places in their file.
        limit: rows of each file to read after those; None reads all.
        max_prompt_tokens: longer prompts are left out, with a warning that names them.
        template_kwargs: passed to the chat template.

    Raises:
        UserError: a file is missing or a row malformed (named), there is text to render but no chat
            template, two sets have one name, or no prompt is left.
    """
    if skip < 0 or (limit is not None and limit < 0):
        raise UserError(f"skip is {skip} and limit is {limit}; neither may be negative")
    reader = Source(source)
    files = reader.files()
    if files is None:
        raise UserError(f"{reader.name}: no such file or folder of prompts")
    renderer = _Renderer(tokenizer, vocab_size, template_kwargs)
    sets: dict[str, Path] = {}
    prompts: list[Prompt] = []
    for path in files:
        name = path.name.split(".")[0]
        if name in sets:
            raise UserError(f"{path} and {sets[name]}: two prompt sets are named {name!r}")
        sets[name] = path
        rows = islice(enumerate(read_file(path)), skip, None if limit is None else skip + limit)
        read = [renderer.prompt(name, index, data, where) for index, (where, data) in rows]
        kept = [p for p in read if max_prompt_tokens is None or len(p.ids) <= max_prompt_tokens]
        if len(kept) < len(read):
            long = [p.prompt_id for p in read if len(p.ids) > (max_prompt_tokens or 0)]
            log.warning(
                "%s: %d of %d prompts have more than %d tokens and are left out (rows %s%s)",
                path,
                len(long),
                len(read),
                max_prompt_tokens,
                ", ".join(map(str, long[:5])),
                ", ..." if len(long) > 5 else "",
            )
        prompts += kept
    if not prompts:
        raise UserError(
            f"{reader.name}: no prompt is left (skip {skip}, limit {limit}, max_prompt_tokens "
            f"{max_prompt_tokens})"
        )
    return prompts


class _Renderer:
    def __init__(
        self, tokenizer: Any, vocab_size: int | None, template_kwargs: Mapping[str, Any] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.template_kwargs = template_kwargs
        self._chat: ChatFormat | None = None

    def prompt(self, set_name: str, index: int, data: dict[str, Any], where: str) -> Prompt:
        response = None
        if data.get("response_ids") is not None:
            response = self._ids(data["response_ids"], f"{where}: response_ids")
        if data.get("prompt_ids") is not None:
            ids = self._ids(data["prompt_ids"], f"{where}: prompt_ids")
            if not ids:
                raise UserError(f"{where}: prompt_ids is empty")
            words = [data["prompt"]] if isinstance(data.get("prompt"), str) else []
            return Prompt(set_name, index, ids, response, self.tokenizer.decode(ids), tuple(words))
        messages, turns = _asked(data, where)
        if self._chat is None:  # its absence matters only now
            self._chat = ChatFormat(self.tokenizer, template_kwargs=self.template_kwargs)
        try:
            text, ids = self._chat.encode_prompt(messages, data.get("tools"))
        except TemplateRefusal as error:
            raise UserError(f"{where}: the target's chat template refuses it: {error}") from error
        return Prompt(set_name, index, ids, response, text, turns)

    def _ids(self, value: Any, where: str) -> list[int]:
        ids = token_ids(value, where)
        if self.vocab_size is not None:
            check_range(ids, self.vocab_size, where)
        return ids


def _asked(data: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
    """The messages up to the first answer, and what the user says in every turn."""
    turns = data.get("turns")
    if turns is not None:
        if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
            raise UserError(f"{where}: turns must be a list of texts, not {turns!r:.60}")
        return [{"role": "user", "content": turns[0]}], tuple(turns)
    messages = row_messages(data, where) or prompt_messages(data, where)
    turns = tuple(_text(message) for message in messages if message["role"] == "user")
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("assistant")] if "assistant" in roles else messages
    if not before:
        raise UserError(f"{where}: no prompt comes before the first assistant turn")
    return before, turns


def _text(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)
