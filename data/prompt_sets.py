"""Files of prompts: the benchmarks' shape, our own, or tokenised already; one named set a file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.formats import check_range, prompt_messages, row_messages, token_ids
from data.presets import PresetSource
from data.render import ChatFormat, Message, TemplateRefusal
from data.rows import TokenRow
from data.sources import Entry, Source, read_file_leniently
from drafter.errors import UserError
from drafter.evaluation.trajectories import EvalPrompt, Skipped, Trajectory

AVERAGE = "average"
HELD_OUT = "held_out"
"""Name of the prompt set that a run's held-out rows make."""

log = logging.getLogger(__name__)

Rows = Iterable[tuple[str, dict[str, Any] | UserError]]
"""(where, row) pairs in order, with an error in the place of a malformed row."""


class NoPromptLeft(UserError):
    """Sets were read, and nothing of them can be used."""


@dataclass(frozen=True)
class Prompt(EvalPrompt):
    """A prompt to measure with or to answer; what `EvalPrompt` holds, and its words.

    Attributes:
        turns: what the user says in each turn. Only those up to `turn` are rendered: a later one
            needs the target's answer to the one before (see `FollowUps`).
        messages: what is rendered; empty for a row that came tokenised.
        tools: passed to the template.
    """

    turns: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: Any = None


def load_prompts(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    skipped: list[Skipped] | None = None,
) -> list[Prompt]:
    """Returns the prompts of the files, set by set, in file order.

    A row is one of {"turns": [...]}, {"prompt": ...}, {"messages": [...]} (used up to its first
    assistant turn) or {"prompt_ids": [...]}, which may come with "response_ids".

    Args:
        source: files (json, jsonl, parquet; plain or .gz), a folder of them, presets ("preset:NAME"
            as in `data/presets.py`), or a list. A file's set is named by its name up to the first
            dot, a preset's by the preset.
        tokenizer: the target's; text is rendered with its template and the generation prompt.
        vocab_size: rows of the target's embedding, to check ids against; None checks nothing.
        skip: rows of each file to pass over first. Prompt ids are rows' places in their file.
        limit: rows of each file to read after those; None reads all.
        max_prompt_tokens: longer prompts are left out, with a warning that names them.
        template_kwargs: passed to the chat template.
        skipped: if given, rows that can't be used are left out and added here, each with its
            reason, instead of raising.

    Raises:
        UserError: a file is missing or a row malformed (named), there is text to render but no chat
            template, two sets have one name, or no prompt is left.
    """
    reader = Source(source, streaming=True)
    sets: dict[str, Rows] = {}
    places: dict[str, Path | str] = {}
    for entry, files in prompt_entries(reader):
        found: list[tuple[str, Path | str, Rows]]
        if isinstance(entry, PresetSource):
            found = [(entry.name, f"preset:{entry.name}", _preset_rows(reader, entry, files))]
        else:
            paths = files or []
            found = [(path.name.split(".")[0], path, read_file_leniently(path)) for path in paths]
        for name, place, rows in found:
            if name in sets:
                raise UserError(f"{place} and {places[name]}: two prompt sets are named {name!r}")
            sets[name], places[name] = rows, place
    return load_prompt_sets(
        sets,
        tokenizer,
        vocab_size=vocab_size,
        skip=skip,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        template_kwargs=template_kwargs,
        skipped=skipped,
        source=reader.name,
    )


def prompt_entries(reader: Source) -> list[Entry]:
    """Returns a source's entries; raises UserError if one is missing: of the hub, only presets."""
    entries = reader.entries()
    if any(files is None and isinstance(entry, str) for entry, files in entries):
        raise UserError(f"{reader.name}: no such file or folder of prompts")
    return entries


def _preset_rows(reader: Source, preset: PresetSource, files: list[Path] | None) -> Rows:
    for where, row in reader.entry_rows(preset, files):
        yield where, UserError(f"{where}: no question") if row is None else row


def load_prompt_sets(
    sets: Mapping[str, Rows],
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    skipped: list[Skipped] | None = None,
    source: str = "prompts",
) -> list[Prompt]:
    """Returns the prompts of named sets of rows; arguments and errors as `load_prompts`.

    Args:
        sets: rows by set name.
        source: names all of them in errors.
    """
    if skip < 0 or (limit is not None and limit < 0):
        raise UserError(f"skip is {skip} and limit is {limit}; neither may be negative")
    renderer = _Renderer(tokenizer, vocab_size, template_kwargs)
    last = None if limit is None else skip + limit
    refused: list[Skipped] = []
    prompts: list[Prompt] = []
    if AVERAGE in sets:
        raise UserError(f"{source}: a prompt set can't be named {AVERAGE!r}; rename it")
    for name, rows in sets.items():
        read: list[Prompt] = []
        for index, (where, data) in islice(enumerate(rows), skip, last):
            try:
                if isinstance(data, UserError):
                    raise data
                read.append(renderer.prompt(name, index, data, where))
            except UserError as error:
                if skipped is None:
                    raise
                refused.append(Skipped(name, index, 0, str(error)))
        prompts += _short_enough(read, max_prompt_tokens, name, refused)
    if skipped is not None:
        skipped += refused
    if not prompts:
        reasons = "; ".join(sorted({entry.reason for entry in refused})[:3])
        raise NoPromptLeft(
            f"{source}: no prompt is left (skip {skip}, limit {limit}, max_prompt_tokens "
            f"{max_prompt_tokens}){': ' if reasons else ''}{reasons}"
        )
    return prompts


def _short_enough(
    prompts: list[Prompt], most: int | None, name: str, skipped: list[Skipped]
) -> list[Prompt]:
    if most is None:
        return prompts
    long = [prompt for prompt in prompts if len(prompt.ids) > most]
    if long:
        named = ", ".join(str(prompt.prompt_id) for prompt in long[:5])
        log.warning(
            "%s: %d of %d prompts have more than %d tokens and are left out (rows %s%s)",
            name,
            len(long),
            len(prompts),
            most,
            named,
            ", ..." if len(long) > 5 else "",
        )
    skipped += [
        Skipped(name, p.prompt_id, p.turn, f"{len(p.ids)} tokens, more than the {most} that fit")
        for p in long
    ]
    return [prompt for prompt in prompts if len(prompt.ids) <= most]


@dataclass
class FollowUps:
    """Makes the prompt of a conversation's next turn, with the target's own reply in its context.

    Args:
        tokenizer: the target's.
        max_prompt_tokens: longer ones are left out.
        template_kwargs: passed to the chat template.
        skipped: turns that were left out, each with its reason.
    """

    tokenizer: Any
    max_prompt_tokens: int | None = None
    template_kwargs: Mapping[str, Any] | None = None
    skipped: list[Skipped] = field(default_factory=list)
    _chat: ChatFormat | None = None

    def has_next(self, prompt: EvalPrompt) -> bool:
        """Returns whether the user says more after this prompt's reply."""
        assert isinstance(prompt, Prompt)
        return bool(prompt.messages) and prompt.turn + 1 < len(prompt.turns)

    def __call__(self, trajectory: Trajectory) -> Prompt | None:
        """Returns the next turn's prompt; None if there is none or it can't be asked."""
        prompt = trajectory.prompt
        assert isinstance(prompt, Prompt)
        if not self.has_next(prompt):
            return None
        turn = prompt.turn + 1
        if not prompt.turns[turn].strip():
            self._skip(replace(prompt, turn=turn), "the turn is empty")
            return None
        reply = self.tokenizer.decode(trajectory.ids, skip_special_tokens=True)
        messages = (
            *prompt.messages,
            {"role": "assistant", "content": reply},
            {"role": "user", "content": prompt.turns[turn]},
        )
        if self._chat is None:
            self._chat = ChatFormat(self.tokenizer, template_kwargs=self.template_kwargs)
        following = replace(prompt, turn=turn, messages=messages, response_ids=None)
        try:
            text, ids = self._chat.encode_prompt(messages, prompt.tools)
        except TemplateRefusal as error:
            self._skip(following, f"the target's chat template refuses it: {error}")
            return None
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            most = self.max_prompt_tokens
            self._skip(following, f"{len(ids)} tokens, more than the {most} that fit")
            return None
        return replace(following, text=text, ids=ids)

    def _skip(self, prompt: Prompt, reason: str) -> None:
        print(f"left out: {prompt.set_name} {prompt.prompt_id}, turn {prompt.turn + 1}: {reason}")
        self.skipped.append(Skipped(prompt.set_name, prompt.prompt_id, prompt.turn, reason))


def held_out_prompts(rows: Sequence[TokenRow], limit: int | None) -> list[EvalPrompt]:
    """Returns the first turn of held-out rows: what stands before the first supervised token."""
    prompts = []
    for row in rows[:limit]:
        supervised = np.flatnonzero(row.supervised)
        start = int(supervised[0])
        gaps = np.flatnonzero(np.diff(supervised) > 1)
        end = int(supervised[gaps[0]] if len(gaps) else supervised[-1]) + 1
        ids = row.input_ids.tolist()
        prompts.append(EvalPrompt(HELD_OUT, row.sample_id, ids[:start], ids[start:end]))
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
            text = self.tokenizer.decode(ids)
            return Prompt(set_name, index, ids, response, text=text, turns=tuple(words))
        messages, turns = _asked(data, where)
        if self._chat is None:  # its absence matters only now
            self._chat = ChatFormat(self.tokenizer, template_kwargs=self.template_kwargs)
        try:
            text, ids = self._chat.encode_prompt(messages, data.get("tools"))
        except TemplateRefusal as error:
            raise UserError(f"{where}: the target's chat template refuses it: {error}") from error
        return Prompt(
            set_name,
            index,
            ids,
            response,
            text=text,
            turns=turns,
            messages=tuple(messages),
            tools=data.get("tools"),
        )

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
        _check_says_something(turns[0], where)
        return [{"role": "user", "content": turns[0]}], tuple(turns)
    messages = row_messages(data, where) or prompt_messages(data, where)
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    before, after = messages[:first], messages[first:]
    asked = [_text(message) for message in before if message["role"] == "user"]
    later = [_text(message) for message in after if message["role"] == "user"]
    turns = ("\n\n".join(asked), *later)
    if not before:
        raise UserError(f"{where}: no prompt comes before the first assistant turn")
    _check_says_something("".join(map(_text, before)), where)
    return before, turns


def _check_says_something(text: str, where: str) -> None:
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty")


def _text(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)
