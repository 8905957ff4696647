"""Goes on with responses that ran into their limit, up to a higher one.

    python -m data.lengthen --target TARGET --responses short.jsonl.gz --output long.jsonl.gz \\
        --max-new-tokens 512

Greedy responses only: the target goes on from what it wrote, so the result is what it would have
written under the higher limit at once (in bf16 up to rounding), for the price of the new tokens.
A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.prompt_sets import Prompt
from data.regenerate import add_target_flags, packed, regenerate, settings_path, target_of
from data.sources import read_file
from drafter.errors import UserError, one_sentence_errors
from drafter.files import file_stamp, write_atomic
from drafter.target import Target


def lengthen(
    target: Target,
    responses: Path,
    output: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[int, int]:
    """Writes a file of responses with those continued that did not end by themselves.

    Args:
        target: That wrote them.
        responses: Rows with `prompt_ids` and `response_ids`; other fields are kept.
        output: .jsonl or .jsonl.gz, rows in the same order.
        max_new_tokens: The new limit of a whole response.
        batch_size: Responses at once.
        progress: Show a bar.

    Returns:
        How many were continued, and how many could not be for want of context.

    Raises:
        UserError: The responses are sampled, another target's, or no rows of this kind; the output
            is no .jsonl file, or there already and made otherwise; the limit is not positive.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{output}: responses are written as .jsonl or .jsonl.gz.")
    settings = {
        "target": target.fingerprint,
        "dtype": str(target.dtype),
        "max_new_tokens": max_new_tokens,
        "lengthened": file_stamp(str(responses)),
    }
    _check_made_by(target, responses)
    if output.exists():
        if _settings_of(output) != settings:
            raise UserError(
                f"{output} exists and was not made of {responses} in this way: choose another "
                "--output."
            )
        _clear(output)
        return 0, 0
    rows = _rows(responses)
    limits = {
        i: min(max_new_tokens, target.max_length - len(row["prompt_ids"]))
        for i, row in enumerate(rows)
        if row["response_ids"][-1] not in target.eos_token_ids
        and len(row["response_ids"]) < max_new_tokens
    }
    waiting = {i: n for i, n in limits.items() if n > len(rows[i]["response_ids"])}
    # what an interrupted run has written counts only if all was as it is now
    made_by = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    # those with the same room together: the target generates to one limit
    for room in sorted({n - len(rows[i]["response_ids"]) for i, n in waiting.items()}):
        own = [i for i, n in waiting.items() if n - len(rows[i]["response_ids"]) == room]
        prompts = [Prompt("more", i, rows[i]["prompt_ids"] + rows[i]["response_ids"]) for i in own]
        part = output.with_name(f".{output.name}.more-{made_by}-{room}.jsonl")
        regenerate(
            target,
            prompts,
            part,
            max_new_tokens=room,
            batch_size=batch_size,
            progress=progress,
        )
        for _, line in read_file(part):
            _extend(rows[line["id"]], line, target)
    write_atomic(settings_path(output), json.dumps(settings, indent=2) + "\n")
    write_atomic(output, packed(rows, output.suffix))
    _clear(output)
    return len(waiting), len(limits) - len(waiting)


def _clear(output: Path) -> None:
    for left in output.parent.glob(f".{output.name}.more-*"):
        left.unlink()


def _settings_of(path: Path) -> dict[str, Any] | None:
    """Returns what lies beside a file of responses, or None.

    Raises:
        UserError: It can't be read.
    """
    beside = settings_path(path)
    if not beside.exists():
        return None
    try:
        settings: dict[str, Any] = json.loads(beside.read_text())
        _ = settings["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside} can't be read as settings of responses ({error}).") from error
    return settings


def _extend(row: dict[str, Any], line: dict[str, Any], target: Target) -> None:
    row["response_ids"] = row["response_ids"] + line["response_ids"]
    if "response" in row:
        ids = row["response_ids"]
        row["response"] = target.tokenizer.decode(ids, skip_special_tokens=True)
    if "finished" in row:
        row["finished"] = line["finished"]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for where, row in read_file(path):
        if not row.get("prompt_ids") or not row.get("response_ids"):
            raise UserError(f"{where} has no prompt_ids and response_ids to go on from.")
        rows.append(row)
    return rows


def _check_made_by(target: Target, responses: Path) -> None:
    """Compares with what `data.regenerate` wrote beside the responses, if it made them."""
    made = _settings_of(responses)
    if made is None:
        return
    if made.get("temperature", 0.0) > 0:
        raise UserError(f"{responses} holds sampled responses; only greedy ones can be continued.")
    if made["target"] != target.fingerprint:
        raise UserError(f"{responses} holds another target's responses than {target.path}'s.")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; prints a user's mistake as one sentence and exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m data.lengthen", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_target_flags(parser)
    parser.add_argument("--responses", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.jsonl[.gz]")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(args)
    with one_sentence_errors():
        target = target_of(options)
        continued, without_room = lengthen(
            target,
            options.responses,
            options.output,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )
        print(
            f"{options.output}: {continued} responses continued now, {without_room} had no room in "
            "the target's context"
        )


if __name__ == "__main__":
    main()
