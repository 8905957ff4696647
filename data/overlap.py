"""Whether prompts that a drafter is measured on were among what it was trained on.

Runs of 13 words (lower case, punctuation aside) are compared, as is usual for language models. Runs
that many prompts of a set share are its instructions, not its questions, and do not count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from data.formats import Tokens, parse
from data.prompt_sets import Prompt
from data.sources import Source
from drafter.errors import UserError
from drafter.evaluation.loading import LoadedDrafter

RUN_WORDS = 13
LEAST_WORDS = 5
"""Shorter prompts say nothing that training rows do not happen to say."""
BOILERPLATE_SHARE = 0.2
"""Runs in more than this share of a set's prompts (and in more than two) are its instructions."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """One set's overlap with training rows.

    Attributes:
        prompts: prompts of the set.
        whole: those of them all of whose runs occur in training rows.
        shared: those that share at least one run with a training row.
    """

    prompts: int
    whole: int
    shared: int


def word_runs(text: str, length: int = RUN_WORDS) -> set[tuple[str, ...]]:
    """Returns the runs of `length` words in a text; a shorter text whole, unless tiny.

    Example:
        >>> sorted(word_runs("The cat sat. The cat!", length=3))
        [('cat', 'sat', 'the'), ('sat', 'the', 'cat'), ('the', 'cat', 'sat')]
    """
    words = _WORD.findall(text.lower())
    if len(words) <= length:
        return {tuple(words)} if len(words) >= LEAST_WORDS else set()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def find_overlap(prompts: Sequence[Prompt], training_texts: Iterable[str]) -> dict[str, Overlap]:
    """Returns each prompt set's overlap with the training texts.

    Args:
        prompts: of any sets; what the user says in their turns is compared.
        training_texts: whole training rows as text.
    """
    sets: dict[str, list[set[tuple[str, ...]]]] = {}
    for prompt in prompts:
        texts = prompt.turns or (prompt.text,)
        runs = set().union(*(word_runs(text) for text in texts))
        sets.setdefault(prompt.set_name, []).append(runs)
    for name, found in sets.items():
        often = Counter(run for runs in found for run in runs)
        most = max(2, int(BOILERPLATE_SHARE * len(found)))
        sets[name] = [{run for run in runs if often[run] <= most} for runs in found]
    wanted = {run for found in sets.values() for runs in found for run in runs}
    lengths = {len(run) for run in wanted}
    seen: set[tuple[str, ...]] = set()
    for text in training_texts:
        words = _WORD.findall(text.lower())
        for length in lengths:
            for start in range(len(words) - length + 1):
                run = tuple(words[start : start + length])
                if run in wanted:
                    seen.add(run)
    return {
        name: Overlap(
            len(found),
            sum(bool(runs) and runs <= seen for runs in found),
            sum(bool(runs & seen) for runs in found),
        )
        for name, found in sets.items()
    }


def training_texts(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    skip: int = 0,
    limit: int | None = None,
    split: str = "train",
) -> Iterator[str]:
    """Yields every training row as text; rows that can't be read are left out, as in training.

    Args:
        source: files or a hub id, as the run's `data.train_data`.
        tokenizer: decodes rows that are tokenised already.
        skip: rows held out at the start.
        limit: rows read in all, those skipped included.
        split: of a hub data set.
    """
    for row in Source(source, split=split).rows(skip):
        if limit is not None and row.index >= limit:
            return
        if not row.asks:
            continue
        try:
            said = parse(row)
        except UserError:
            continue
        if isinstance(said, Tokens):
            yield tokenizer.decode([*said.prompt_ids, *said.response_ids])
        else:
            yield "\n".join(str(message.get("content", "")) for message in said.messages)


def overlap_with_runs(
    drafters: Sequence[LoadedDrafter],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    checked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns, by drafter, each set's overlap with its training rows, or why it isn't known.

    Args:
        drafters: Whose run's config.yaml says what they were trained on.
        prompts: That they are measured on.
        tokenizer: The target's.
        checked: What earlier calls with the same prompts have found, by training rows; added to.
    """
    checked = {} if checked is None else checked
    found: dict[str, Any] = {}
    for loaded in drafters:
        if loaded.run_config is None:
            found[loaded.name] = "not checked: its training data is not recorded beside it"
            continue
        data = yaml.safe_load(loaded.run_config.read_text()).get("data", {})
        files = data.get("train_data")
        files = [files] if isinstance(files, str) else files or []
        if files and not _are_local(files):
            found[loaded.name] = "not checked: its training rows are not files on this machine"
            continue
        held_out = data.get("val_rows", 0) if data.get("val_data") is None else 0
        key = json.dumps([files, held_out, data.get("limit_rows"), data.get("train_split")])
        if key not in checked:
            try:
                texts = training_texts(
                    data["train_data"],
                    tokenizer,
                    skip=held_out,
                    limit=data.get("limit_rows"),
                    split=data.get("train_split", "train"),
                )
                sets = find_overlap(prompts, texts)
                checked[key] = {name: asdict(overlap) for name, overlap in sets.items()}
            except (UserError, KeyError) as error:
                checked[key] = f"not checked: {error}"
        found[loaded.name] = checked[key]
    return found


def _are_local(files: Sequence[str]) -> bool:
    """Returns whether training rows are files that are still there."""
    try:
        return Source(files).files() is not None
    except UserError:
        return False


def overlap_lines(found: dict[str, Any]) -> list[str]:
    """Returns what `overlap_with_runs` found, a line a drafter."""
    lines = []
    for name, sets in found.items():
        told = sets
        if not isinstance(sets, str):
            hits = {s: row for s, row in sets.items() if row["shared"]}
            told = ", ".join(f"{s} {row['shared']} of {row['prompts']}" for s, row in hits.items())
            told = f"{told or 'no prompt'} shares a run of {RUN_WORDS} words with it"
        lines.append(f"overlap with the training data of {name}: {told}")
    return lines
