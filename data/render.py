"""The target's chat template and tokenizer: a conversation's text, its ids, the template's habits.

Token ids are always those of one call of the tokenizer on the whole rendering, no special tokens
added: what the target is served. Where the assistant turns lie in it is found by `data/turns.py`.
Legend: T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from drafter.errors import UserError

Message = dict[str, Any]


class TemplateRefusal(Exception):
    """The chat template raised on this conversation (e.g. roles that do not alternate)."""


@dataclass(frozen=True)
class Habits:
    """What a template does around an assistant turn, learnt from a plain user/assistant exchange.

    Attributes:
        generation_prompt: what add_generation_prompt appends.
        header: the beginning of it that a turn inside a conversation has too.
        lead: what such a turn has between that and its content.
        closing_ids: tokens that end a turn.
        closing_text: ends a turn, where no special token does.
    """

    generation_prompt: str
    header: str
    lead: str
    closing_ids: frozenset[int]
    closing_text: str


class ChatFormat:
    """Renders conversations with a tokenizer's own chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend and a chat template.
        eos_token_ids: all ids that end the target's generation (its generation config may name more
            than the tokenizer does).
        template_kwargs: passed to the template, e.g. `{"enable_thinking": False}`.

    Raises:
        UserError: no chat template, no fast backend, or a template that refuses a plain exchange.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_token_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                "the target's tokenizer has no chat template, so conversations cannot be rendered "
                "as the target expects: use an instruct model, set tokenizer.chat_template, or "
                "give rows that are tokenised already (prompt_ids, response_ids)"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, which finding the "
                "assistant turns needs: use a tokenizer with a fast backend, or give rows that are "
                "tokenised already (prompt_ids, response_ids)"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._offset_twin = _untrimmed_twin(tokenizer)
        self.habits = self._learn(known_eos_ids(tokenizer, eos_token_ids))

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False, tools: Any = None
    ) -> str:
        """Returns the template's text, with the generation prompt if `prompt`.

        Raises:
            TemplateRefusal: the template raised; its message is kept.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.template_kwargs,
            )
        except Exception as error:  # a template may raise anything
            raise TemplateRefusal(str(error)) from error
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns the ids of `text` and their (T, 2) character spans, no special tokens added."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        offsets = encoded["offset_mapping"]
        if self._offset_twin is not None:
            twin = self._offset_twin.encode(text, add_special_tokens=False)
            assert twin.ids == ids, "removing the post-processor changed the token ids"
            offsets = twin.offsets
        return ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def encode_prompt(
        self, messages: Sequence[Message], tools: Any = None
    ) -> tuple[str, list[int]]:
        """Returns text and ids of `messages` followed by the generation prompt.

        Raises:
            TemplateRefusal: the template raised.
        """
        text = self.render(messages, prompt=True, tools=tools)
        return text, self.encode(text)[0]

    def _learn(self, eos_ids: frozenset[int]) -> Habits:
        user, answer, again = islice(private_characters(), 3)
        ask = {"role": "user", "content": user}
        reply = {"role": "assistant", "content": answer}
        try:
            asked, prompted = self.render([ask]), self.render([ask], prompt=True)
            ended = self.render([ask, reply])
            middle = self.render([ask, reply, {"role": "user", "content": again}])
        except TemplateRefusal as error:
            raise UserError(
                f"the target's chat template refuses a plain user/assistant exchange: {error}"
            ) from error
        for role, text, mark in (("user", prompted, user), ("assistant", ended, answer)):
            if text.count(mark) != 1:
                raise UserError(
                    f"the target's chat template shows the {role}'s words {text.count(mark)} times "
                    "in a plain exchange, not once: correct tokenizer.chat_template"
                )

        # The generation prompt: what follows the text common to both, cut where a token begins
        # (some templates end a finished conversation with EOS, so one need not begin the other).
        shared = common_prefix(asked, prompted)
        if shared < len(asked):
            starts = self.encode(prompted)[1][:, 0]
            shared = int(starts[starts <= shared].max(initial=0))
        generation_prompt = prompted[shared:]
        inside = middle[shared : middle.index(answer)] if answer in middle else generation_prompt
        header = generation_prompt[: common_prefix(generation_prompt, inside)]

        tail_start = ended.index(answer) + len(answer)
        special = _special_ids(self.tokenizer)
        closing = [
            token
            for token, (first, _) in zip(*self.encode(ended), strict=True)
            if first >= tail_start and token in special
        ]
        return Habits(
            generation_prompt=generation_prompt,
            header=header,
            lead=inside[len(header) :],
            closing_ids=eos_ids | frozenset(closing[:1]),
            closing_text="" if closing else ended[tail_start:].rstrip(),
        )


def known_eos_ids(tokenizer: Any, eos_token_ids: Sequence[int] = ()) -> frozenset[int]:
    """Returns the given ids together with the tokenizer's own EOS id."""
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(eos_token_ids) | (frozenset() if own is None else frozenset([int(own)]))


def fingerprint(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Returns short hashes of the tokenizer and of its chat template, for keys of stored tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        parts = json.loads(backend.to_str())
        # padding and truncation are settings of the last call, not of the tokenizer
        parts.pop("padding", None)
        parts.pop("truncation", None)
        vocabulary = json.dumps(parts, sort_keys=True)
    else:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(
        [getattr(tokenizer, "chat_template", None), dict(template_kwargs or {})], sort_keys=True
    )
    return {"tokenizer": _short_hash(vocabulary), "chat_template": _short_hash(template)}


def private_characters() -> Iterator[str]:
    """Yields characters of Unicode's private use area: no text has all of them."""
    return map(chr, range(0xE000, 0xF900))


def common_prefix(a: str, b: str) -> int:
    """Returns the length of the longest common prefix (bisection on slices: fast on long texts)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        half = (low + high + 1) // 2
        if a[low:half] == b[low:half]:
            low = half
        else:
            high = half - 1
    return low


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _untrimmed_twin(tokenizer: Any) -> Any:
    """A copy of the backend that reports whole spans, or None where the tokenizer does so itself.

    A byte-level post-processor with trim_offsets leaves leading spaces out of the spans, so that a
    space before a turn could not be told from one inside it. With no special tokens added it
    changes no ids.
    """
    backend = tokenizer.backend_tokenizer
    processor = json.dumps(json.loads(backend.to_str()).get("post_processor"))
    if '"trim_offsets": true' not in processor:
        return None
    twin = type(backend).from_str(backend.to_str())
    twin.post_processor = None
    twin.no_truncation()
    twin.no_padding()
    return twin
