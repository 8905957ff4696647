"""A result as text for the terminal, and the names and numbers in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafter.evaluation.loading import LoadedDrafter
from drafter.evaluation.results import AVERAGE, names_of

_NAMELESS = ("/", "checkpoints")


def table(result: dict[str, Any]) -> str:
    """Returns the report as aligned text, one row for each drafter and set, by mode."""
    parts = []
    for mode in ("replay", "decode"):
        names = [*names_of(result, mode), AVERAGE]
        if len(names) == 1:
            continue
        head = ["drafter", "set", "accepted length", "95 %", "per response", "unclipped", "waste"]
        head += ["tokens/s", "plain", "ratio"] if mode == "decode" else []
        head += ["responses"]
        rows = [head]
        for drafter in result["drafters"]:
            figures = drafter.get("figures", {}).get(mode)
            if figures is None:
                continue
            for name in names:
                own = figures[AVERAGE] if name == AVERAGE else figures["sets"].get(name)
                if own:
                    rows.append([drafter["name"], name, *_cells(own, mode)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        parts.append("\n".join([f"-- {mode}", *lines]))
    return "\n\n".join([*parts, "\n".join(_sentences(result))])


def _cells(figures: dict[str, Any], mode: str) -> list[str]:
    length = figures["accepted_length"]
    cells = [
        number(length["value"]),
        f"{number(length['low'])} to {number(length['high'])}",
        number(figures["accepted_length_per_response"]["value"]),
        number(figures["accepted_length_unclipped"]["value"]),
        number(figures["waste_ratio"]["value"]),
    ]
    if mode == "decode":
        cells += [
            number(figures[name]["value"], places) if name in figures else ""
            for name, places in (
                ("tokens_per_second", 1),
                ("tokens_per_second_plain", 1),
                ("speedup", 2),
            )
        ]
    return [*cells, f"{figures['responses']}"]


def _sentences(result: dict[str, Any]) -> list[str]:
    """Returns what the tables do not say, a line each."""
    lines = []
    for row in result["comparisons"]:
        if row["figure"] == "accepted_length" and row["set"] == AVERAGE:
            found = row["difference"]
            lines.append(
                f"{row['mode']}: {row['a']} against {row['b']}, average accepted length: "
                f"{signed(found['value'])} ({signed(found['low'])} to {signed(found['high'])}): "
                f"{row['verdict']}"
            )
    for key, what in (
        ("audit", "speculative and plain text"),
        ("agreement", "the loop's and replay's rounds"),
    ):
        for found in result.get(key, []):
            lines.append(
                f"{found['drafter']}: {what} are the same in {found['identical']} of "
                f"{found['responses']} responses; of the others {found['explained']} are explained "
                f"by rounding, {found['unexplained']} are not"
            )
    cost = replay_cost(result)
    if cost:
        lines.append(cost)
    return lines


def replay_cost(result: dict[str, Any]) -> str:
    """Returns how replay's seconds per emitted token compare with the loop's; "" without both."""
    for drafter in result["drafters"]:
        modes = drafter["responses"]
        if not (modes.get("replay") and modes.get("decode")):
            continue
        replay = sum(row["seconds"]["replay"] for row in modes["replay"])
        replay /= sum(row["response_tokens"] for row in modes["replay"])
        loop = sum(
            value
            for row in modes["decode"]
            for phase, value in row["seconds"].items()
            if phase != "plain"
        ) / sum(row["response_tokens"] for row in modes["decode"])
        return (
            f"replay takes {1e3 * replay:.3f} ms per emitted token, the loop {1e3 * loop:.2f} ms: "
            f"1/{loop / replay:.0f}"
        )
    return ""


def signed(value: float | None) -> str:
    """Returns a difference with its sign; "-" for none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def number(value: float | None, places: int = 3) -> str:
    """Returns a figure as text; "-" for none.

    Example:
        >>> number(1.23456), number(None), number(float("nan"), 1)
        ('1.235', '-', '-')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def name_apart(drafters: Sequence[LoadedDrafter]) -> list[LoadedDrafter]:
    """Returns the drafters under names that tell them apart, with K where it is not the trained."""
    names = short_names([loaded.name for loaded in drafters])
    out = []
    for loaded, name in zip(drafters, names, strict=True):
        size = loaded.other_block_size
        out.append(replace(loaded, name=name if size is None else f"{name} @ K {size}"))
    return out


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the fewest last parts of paths that still tell them apart.

    Example:
        >>> short_names(["runs/a/checkpoints/best.ckpt", "runs/b"])
        ['a/best', 'b']
        >>> short_names(["old/x", "new/x", "new/x"])
        ['old/x', 'new/x', 'new/x (2)']
    """
    parts = [
        [
            part
            for part in Path(name.removesuffix(".ckpt")).parts
            if part not in ("/", "checkpoints")
        ]
        for name in names
    ]
    least = [2 if name.endswith(".ckpt") else 1 for name in names]
    for more in range(max(map(len, parts), default=0) + 1):
        short = ["/".join(own[-(few + more) :]) for own, few in zip(parts, least, strict=True)]
        if len(set(short)) == len(set(names)):
            break
    return [
        name if short[:place].count(name) == 0 else f"{name} ({short[:place].count(name) + 1})"
        for place, name in enumerate(short)
    ]
