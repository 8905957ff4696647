"""Token rows, the report on what became of a source's rows, and the step from one to the other.

Legend: T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from data.formats import Tokens, check_range, parse
from data.render import ChatFormat, TemplateRefusal, known_eos_ids
from data.sources import SourceRow
from data.turns import encode_conversation
from drafter.blocks import candidates
from drafter.errors import UserError

# Why a row is left out. Each is counted and its first rows are named.
EMPTY = "empty response"
NO_QUESTION = "no question"
REFUSED = "refused by the chat template"
UNSUPERVISED = "no supervised token"
CUT_AWAY = "no supervised token within max_length"
NO_ANCHOR = "fewer than two supervised tokens in a row, so no anchor"
HELD_OUT_PROMPT = "prompt of a held-out row"
NAMED_ROWS = 5
COUNTED_AT_ONCE = 1024


@dataclass(slots=True)
class TokenRow:
    """A conversation as tokens.

    Attributes:
        sample_id: the row's place in its source; the same whatever `skip` and `limit` are.
        input_ids: (T,) int32.
        supervised: (T,) bool, the tokens that the target would have to write.
    """

    sample_id: int
    input_ids: np.ndarray
    supervised: np.ndarray

    @property
    def prompt(self) -> bytes:
        """What stands before the first supervised token, as bytes: equal for equal prompts."""
        return self.input_ids[: int(self.supervised.argmax())].tobytes()


@dataclass
class Tally:
    """How many rows something happened to, and where the first of them are."""

    count: int = 0
    sample_ids: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def add(self, row: SourceRow, note: str = "") -> None:
        """Counts one row; the first few are named, with a note."""
        self.count += 1
        if len(self.sample_ids) < NAMED_ROWS:
            self.sample_ids.append(row.index)
            self.where.append(f"{row.where} ({note})" if note else row.where)

    def __str__(self) -> str:
        """E.g. "2 (a.jsonl, line 3; a.jsonl, line 9)"."""
        more = "; ..." if self.count > len(self.where) else ""
        return f"{self.count:,} ({'; '.join(self.where)}{more})"


@dataclass
class RowReport:
    """What became of the rows of a source.

    Attributes:
        source: as the user named it.
        read: rows read.
        kept: rows that training can use.
        tokens: tokens of those.
        supervised_tokens: those of them that are supervised.
        longest: tokens of the longest row kept.
        truncated: rows cut to max_length (kept ones and those that lost all supervision by it).
        open_turns: assistant turns that no end-of-turn token closes.
        left_out: reason -> rows.
        cut: the first rows cut.
    """

    source: str
    read: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    open_turns: int = 0
    longest: int = 0
    left_out: dict[str, Tally] = field(default_factory=dict)
    cut: Tally = field(default_factory=Tally)

    @property
    def truncated(self) -> int:
        """Rows cut to max_length, kept or not."""
        return self.cut.count

    def leave_out(self, row: SourceRow, reason: str, note: str = "") -> None:
        """Counts a row that training cannot use."""
        self.left_out.setdefault(reason, Tally()).add(row, note)

    def __str__(self) -> str:
        """One line for the log: what was kept, and what was not and why."""
        text = (
            f"{self.source}: {self.kept:,} of {self.read:,} rows kept, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} of them supervised"
        )
        for reason, tally in self.left_out.items():
            text += f"; left out, {reason}: {tally}"
        if self.cut.count:
            text += f"; cut to max_length: {self.cut}"
        if self.open_turns:
            text += f"; {self.open_turns:,} assistant turns end without an end-of-turn token"
        return text

    def check_usable(self) -> None:
        """Raises UserError if no row can train a drafter."""
        if self.kept:
            return
        if not self.read:
            raise UserError(f"{self.source}: no rows (after skip and limit)")
        reasons = "; ".join(f"{reason}: {tally}" for reason, tally in self.left_out.items())
        hint = ""
        if UNSUPERVISED in self.left_out:
            hint = "; data/regenerate.py lets the target answer prompts"
        elif HELD_OUT_PROMPT in self.left_out:
            hint = "; --data.val_data holds out rows of your own choice instead"
        raise UserError(
            f"{self.source}: none of {self.read:,} rows can be trained on: {reasons}{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain containers, for a file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowReport:
        """The inverse of `to_dict`."""
        left_out = {reason: Tally(**tally) for reason, tally in data["left_out"].items()}
        return cls(**{**data, "left_out": left_out, "cut": Tally(**data["cut"])})


class RowSet(Sequence[TokenRow]):
    """The rows of a source that training can use, and the report on the others."""

    def __init__(self, rows: Sequence[TokenRow], report: RowReport) -> None:
        self.rows = rows
        self.report = report

    def __len__(self) -> int:
        """Returns the number of usable rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | Sequence[TokenRow]:
        """Returns a row, or some rows for a slice."""
        return self.rows[index]

    def __iter__(self) -> Iterator[TokenRow]:
        """Yields the rows in the source's order."""
        return iter(self.rows)

    def supervised_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each token is supervised, (vocab_size,) int64; reads every row."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self), COUNTED_AT_ONCE):
            rows = self.rows[start : start + COUNTED_AT_ONCE]
            ids = np.concatenate([row.input_ids[row.supervised] for row in rows])
            counts += np.bincount(ids, minlength=vocab_size)
        return counts

    def tokens(self, index: int) -> int:
        """Returns a row's length; rows on disk are not read for it."""
        if hasattr(self.rows, "tokens"):
            return int(self.rows.tokens(index))
        return len(self.rows[index].input_ids)


class RowTokenizer:
    """Turns source rows into token rows, counting in a report what it leaves out.

    Args:
        tokenizer: the target's; its chat template is needed only once a row has text.
        vocab_size: rows of the target's embedding.
        max_length: longer rows are cut to it; None cuts none.
        target_max_length: what the target allows; None if it has no limit.
        eos_token_ids: ids that end the target's generation, beside the tokenizer's own.
        template_kwargs: passed to the chat template.
        held_out: prompts (`TokenRow.prompt`) whose rows are left out.

    Raises:
        UserError: max_length is not positive or more than the target allows.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_length: int | None = None,
        target_max_length: int | None = None,
        eos_token_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        held_out: Collection[bytes] = (),
    ) -> None:
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length is {max_length}; rows need at least 2 tokens")
        if max_length and target_max_length and max_length > target_max_length:
            raise UserError(
                f"max_length is {max_length}, but the target's context is {target_max_length} "
                f"tokens: set max_length to {target_max_length} or less"
            )
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.target_max_length = target_max_length
        self.eos_token_ids = known_eos_ids(tokenizer, eos_token_ids)
        self.template_kwargs = template_kwargs
        self.held_out = held_out
        self._chat: ChatFormat | None = None

    @property
    def chat(self) -> ChatFormat:
        """The target's chat format, made when the first row needs it."""
        if self._chat is None:
            self._chat = ChatFormat(
                self.tokenizer,
                eos_token_ids=sorted(self.eos_token_ids),
                template_kwargs=self.template_kwargs,
            )
        return self._chat

    def __call__(self, row: SourceRow, report: RowReport) -> TokenRow | None:
        """Returns the row's tokens, or None if training cannot use it; counts either way.

        Raises:
            UserError: a malformed row, an id outside the vocabulary, a turn that cannot be located,
                or a row longer than the target allows with no max_length given. Names the row.
        """
        report.read += 1
        if not row.asks:
            report.leave_out(row, NO_QUESTION)
            return None
        parsed = parse(row)
        if parsed.says_nothing:
            report.leave_out(row, EMPTY)
            return None
        open_turns = 0
        if isinstance(parsed, Tokens):
            ids, supervised = self._join(parsed)
        elif not parsed.answers:
            report.leave_out(row, UNSUPERVISED, f"no answer in {', '.join(row.data)}")
            return None
        else:
            try:
                rendered = encode_conversation(self.chat, parsed.messages, parsed.tools, row.where)
            except TemplateRefusal as error:
                report.leave_out(row, REFUSED, str(error))
                return None
            ids, supervised, open_turns = rendered.ids, rendered.supervised, rendered.open_turns
        check_range(ids, self.vocab_size, row.where)
        if not supervised.any():
            report.leave_out(row, UNSUPERVISED)
            return None
        ids, supervised = self._cut(ids, supervised, row, report)
        if not len(candidates(supervised)):
            report.leave_out(row, NO_ANCHOR if supervised.any() else CUT_AWAY)
            return None
        kept = TokenRow(row.index, ids.astype(np.int32), supervised)
        if self.held_out and kept.prompt in self.held_out:
            report.leave_out(row, HELD_OUT_PROMPT)
            return None
        report.kept += 1
        report.tokens += len(ids)
        report.longest = max(report.longest, len(ids))
        report.supervised_tokens += int(supervised.sum())
        report.open_turns += open_turns
        return kept

    def _join(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(tokens.prompt_ids + tokens.response_ids, dtype=np.int64)
        first = len(tokens.prompt_ids)
        supervised = np.arange(len(ids)) >= first
        ends = np.isin(ids[first:], sorted(self.eos_token_ids)).nonzero()[0]
        if len(ends):  # the target writes nothing after its EOS
            supervised[first + ends[0] + 1 :] = False
        return ids, supervised

    def _cut(
        self, ids: np.ndarray, supervised: np.ndarray, row: SourceRow, report: RowReport
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.max_length is not None and len(ids) > self.max_length:
            report.cut.add(row)
            # copies: a view would keep the whole row alive
            return ids[: self.max_length].copy(), supervised[: self.max_length].copy()
        if self.target_max_length and len(ids) > self.target_max_length:
            raise UserError(
                f"{row.where}: {len(ids)} tokens, more than the target's context of "
                f"{self.target_max_length}: set max_length to cut such rows"
            )
        return ids, supervised
