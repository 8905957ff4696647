"""The prompts of a report, as token ids, with the target's own answers: `<stem>-prompts.jsonl`.

Every line is also a row of a prompt file: the same report can be made of the file alone, but for
sampled answers, which are drawn anew: their random numbers go by the set's name and the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drafter.errors import UserError
from drafter.evaluation.trajectories import EvalPrompt, Trajectory
from drafter.files import write_atomic

Place = tuple[str, int, int, str]
"""Set, place in it, turn, and hash of the prompt's tokens: what a response is known by."""


def asked_rows(
    prompts: Sequence[EvalPrompt],
    trajectories: Sequence[Trajectory],
    decoded: Mapping[tuple[str, int, int], list[int]],
) -> list[dict[str, Any]]:
    """Returns a row for every prompt: `set_name`, `prompt_id`, `turn`, `prompt_hash`, `text` (as
    rendered, with the generation prompt), `prompt_ids`, `response_ids`.

    Args:
        prompts: Of all turns.
        trajectories: What the target answered, as far as it was asked by itself.
        decoded: What it answered in the decoding loop's comparison, by set, place and turn.
    """
    answers = dict(decoded)
    answers |= {(t.prompt.set_name, t.prompt.prompt_id, t.prompt.turn): t.ids for t in trajectories}
    rows = []
    for prompt in prompts:
        row = {
            "set_name": prompt.set_name,
            "prompt_id": prompt.prompt_id,
            "turn": prompt.turn,
            "prompt_hash": prompt.digest,
            "text": prompt.text,
            "prompt_ids": prompt.ids,
        }
        answer = answers.get((prompt.set_name, prompt.prompt_id, prompt.turn))
        rows.append(row if answer is None else {**row, "response_ids": answer})
    return rows


def asked_path(result: Path) -> Path:
    """Returns where the prompts of a result file lie."""
    return result.with_name(f"{result.with_suffix('').name}-prompts.jsonl")


def check_output(result: Path, prompts: Iterable[str] = ()) -> None:
    """Raises UserError where a result and its prompts would replace a user's file.

    Args:
        result: The result file that is asked for.
        prompts: Files and folders that are measured on.
    """
    rows = asked_path(result)
    given = {Path(path).resolve() for path in prompts}
    for path in (result, rows):
        # the next report of a folder would read what this one laid there
        if path.resolve() in given or (path.exists() and path.resolve().parent in given):
            raise UserError(f"--output {result} would replace {path}, of --prompts; rename it.")
    if rows.exists() and not wrote_asked(rows):
        raise UserError(
            f"--output {result} would replace {rows}, which no report has written; rename it."
        )


def wrote_asked(path: Path) -> bool:
    """Returns whether a file holds a report's prompts, by its first row."""
    try:
        with path.open() as file:
            return "prompt_hash" in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False


def write_asked(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes rows, one JSON object a line."""
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_asked(result: Path) -> list[dict[str, Any]]:
    """Returns the rows beside a result file; none if an older version wrote it.

    Raises:
        UserError: The file can't be read.
    """
    path = asked_path(result)
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row_place(row)
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}); make the report anew.") from error


def row_place(row: Mapping[str, Any]) -> Place:
    """Returns what a row's response is known by."""
    return row["set_name"], row["prompt_id"], row["turn"], row["prompt_hash"]


def merge_asked(parts: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the rows of several results, each prompt once."""
    return list({row_place(row): row for rows in parts for row in rows}.values())
