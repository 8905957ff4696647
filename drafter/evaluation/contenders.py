"""Drafters in every way that their drafts are to be used: what is measured side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from drafter.draft_length import read_draft_length
from drafter.errors import UserError
from drafter.evaluation.loading import LoadedDrafter
from drafter.sampling import Sampling
from drafter.search import Search


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `searches_of` reads."""
    parser.add_argument(
        "--search",
        nargs="+",
        default=["plain"],
        choices=("plain", "tree", "self-select"),
        help="drafts of a round: the argmax one; a tree of the most probable beginnings; or "
        "several, drawn and merged. Ways given together are measured side by side; all are exact",
    )
    parser.add_argument(
        "--budget",
        type=int,
        nargs="+",
        help=f"tokens of a tree (default: {Search.budget}); several, side by side",
    )
    parser.add_argument(
        "--drafts",
        type=int,
        nargs="+",
        help=f"of self-select, with the argmax one (default: {Search.drafts}); or several numbers",
    )


def searches_of(options: argparse.Namespace) -> list[Search | None]:
    """Returns the ways to search drafts that are asked for, None for the one draft.

    Raises:
        UserError: A size is none that a search can have, or its search is not asked for.
    """
    for kind, flag in (("tree", "budget"), ("self-select", "drafts")):
        if getattr(options, flag) and kind not in options.search:
            raise UserError(f"--{flag} is of --search {kind}; give both, or neither.")
    budgets = dict.fromkeys(options.budget or [Search.budget])
    drafts = dict.fromkeys(options.drafts or [Search.drafts])
    ways: dict[str, list[Search | None]] = {
        "plain": [None],
        "tree": [Search("tree", budget=budget) for budget in budgets],
        "self-select": [Search("self-select", drafts=count) for count in drafts],
    }
    return [search for kind in dict.fromkeys(options.search) for search in ways[kind]]


def with_searches(
    drafters: Sequence[LoadedDrafter], searches: Sequence[Search | None]
) -> list[LoadedDrafter]:
    """Returns each drafter once for every way to search its drafts."""
    return [
        loaded
        if search is None
        else replace(loaded, name=f"{loaded.name}, {search.label}", search=search)
        for loaded in drafters
        for search in searches
    ]


def with_draft_length(
    drafters: Sequence[LoadedDrafter], file: str, sampling: Sampling
) -> list[LoadedDrafter]:
    """Returns the drafters that a draft length was found for, with drafts cut so.

    Args:
        drafters: Any.
        file: What `evaluate.py calibrate` wrote.
        sampling: Of the responses to come; another than the file's is warned of.

    Raises:
        UserError: It is no such file, or of none of these drafters.
    """
    length, record = read_draft_length(Path(file))
    cut = [
        replace(loaded, name=f"{loaded.name}, {length.label}", length=length)
        for loaded in drafters
        if loaded.fingerprint == record["fingerprint"]
        and loaded.drafter.config.block_size == record["block_size"]
    ]
    if not cut:
        raise UserError(
            f"{file} was found for another drafter or block size than these; run "
            "evaluate.py calibrate for one of them."
        )
    if record["sampling"] != asdict(sampling):
        print(f"warning: {file} was found for responses sampled in another way")
    return cut
