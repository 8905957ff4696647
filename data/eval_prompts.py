"""What an evaluation measures on: benchmarks of the hub, folders of them, and other files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmarks import benchmark_rows
from data.prompt_sets import (
    FollowUps,
    NoPromptLeft,
    Prompt,
    load_prompt_sets,
    load_prompts,
    prompt_entries,
)
from data.sources import Source
from drafter.errors import UserError
from drafter.target import Target

NOTHING = "nothing to measure on: pass --benchmarks, --benchmark-dir or --prompts."


def check_eval_prompts(
    benchmarks: Sequence[str], benchmark_dir: str | None, files: Sequence[str]
) -> None:
    """Checks what can be said of `load_eval_prompts`' sources before a target is loaded.

    Raises:
        UserError: Nothing is named, a file is missing, or no benchmark has that name.
    """
    given = _files(benchmarks, benchmark_dir, files)
    if not (given or benchmarks):
        raise UserError(NOTHING)
    if not benchmark_dir:
        benchmark_rows(benchmarks)
    if given:
        prompt_entries(Source(given))


def _files(benchmarks: Sequence[str], benchmark_dir: str | None, files: Sequence[str]) -> list[str]:
    if not benchmark_dir:
        return list(files)
    named = [str(Path(benchmark_dir) / f"{name}.jsonl") for name in benchmarks]
    return [*files, *(named or [benchmark_dir])]


def load_eval_prompts(
    target: Target,
    max_new_tokens: int,
    *,
    benchmarks: Sequence[str] = (),
    benchmark_dir: str | None = None,
    files: Sequence[str] = (),
    skip: int = 0,
    limit: int | None = None,
) -> tuple[list[Prompt], FollowUps]:
    """Returns the first turns of all sets, and what makes the turns after them.

    What can't be used is left out, printed by reason, and listed in the follow-ups' `skipped`.

    Args:
        target: Whose template and context decide.
        max_new_tokens: A response that must find room behind a prompt.
        benchmarks: Names of `data.benchmarks`, or of files in `benchmark_dir`.
        benchmark_dir: Folder of `<name>.jsonl`; without names, all of it.
        files: Other prompt files.
        skip: Prompts of each set passed over first.
        limit: Prompts of each set.

    Raises:
        UserError: Nothing to measure on is named, nothing of it is left, or a response has no room.
    """
    room = target.max_length - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the target's "
            f"context of {target.max_length}; lower it."
        )
    follow_up = FollowUps(target.tokenizer, room)
    common: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "skip": skip,
        "limit": limit,
        "max_prompt_tokens": room,
        "skipped": follow_up.skipped,
    }
    given = _files(benchmarks, benchmark_dir, files)
    prompts: list[Prompt] = []
    empty: list[UserError] = []
    if benchmarks and not benchmark_dir:
        rows = benchmark_rows(benchmarks)
        try:
            prompts += load_prompt_sets(rows, target.tokenizer, source="benchmarks", **common)
        except NoPromptLeft as error:
            empty.append(error)
    if given:
        try:
            found = load_prompts(given, target.tokenizer, **common)
        except NoPromptLeft as error:
            empty.append(error)
        else:
            twice = {p.set_name for p in found} & {p.set_name for p in prompts}
            if twice:
                raise UserError(
                    f"{', '.join(sorted(twice))} names both a benchmark and a prompt file; rename "
                    "the file."
                )
            prompts += found
    if not prompts:
        raise (empty[0] if empty else UserError(NOTHING))
    reasons = Counter((entry.set_name, entry.reason) for entry in follow_up.skipped)
    for (name, reason), count in reasons.items():
        print(f"left out: {name}: {count} x {reason}")
    return prompts, follow_up
