"""A result as Markdown tables in the paper's form: a row a drafter, a column a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafter.evaluation.results import AVERAGE, names_of
from drafter.evaluation.tables import number, signed


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables: a row a drafter, a column a benchmark, the average last."""
    parts: list[str] = []
    for mode in ("replay", "decode"):
        names = list(names_of(result, mode))
        if not names:
            continue
        figures = {
            drafter["name"]: drafter["figures"][mode]
            for drafter in result["drafters"]
            if mode in drafter.get("figures", {})
        }
        what = "replay" if mode == "replay" else "real loop"
        parts.append(f"**Accepted length ({what}, 95 % interval)**\n")
        parts.append(_markdown_table(figures, names, "accepted_length"))
        if mode == "decode":
            parts.append("\n**Tokens per second over the target alone**\n")
            parts.append(_markdown_table(figures, names, "speedup", places=2))
        parts.append("\n**Waste ratio**\n")
        parts.append(_markdown_table(figures, names, "waste_ratio"))
        parts.append("")
    differences = [row for row in result["comparisons"] if row["figure"] == "accepted_length"]
    if differences:
        parts += ["**Differences in accepted length, on the same prompts**\n"]
        parts += markdown_rows(*comparison_rows(differences))
        parts.append("")
    return "\n".join(parts)


def comparison_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of a table of paired differences."""
    head = ["mode", "drafter", "against", "set", "difference", "95 %", "prompts", "verdict"]
    body = [
        [
            row["mode"],
            row["a"],
            row["b"],
            row["set"],
            signed(row["difference"]["value"]),
            f"{signed(row['difference']['low'])} to {signed(row['difference']['high'])}",
            str(row["prompts"]),
            row["verdict"],
        ]
        for row in rows
    ]
    return head, body


def _markdown_table(
    figures: Mapping[str, Any], names: Sequence[str], figure: str, places: int = 3
) -> str:
    return "\n".join(markdown_rows(*figure_rows(figures, names, figure, places)))


def figure_rows(
    figures: Mapping[str, Any], names: Sequence[str], figure: str, places: int = 3
) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of a figure with its interval, by drafter and set; the average last."""
    head = ["drafter", *names, AVERAGE]
    rows = []
    for drafter, found in figures.items():
        cells = [drafter]
        for name in (*names, AVERAGE):
            own = found[AVERAGE] if name == AVERAGE else found["sets"].get(name, {})
            cells.append(with_interval(own.get(figure), places))
        rows.append(cells)
    return head, rows


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]


def with_interval(found: Mapping[str, Any] | None, places: int = 3) -> str:
    """Returns "value (low-high)"; "-" for none."""
    if not found:
        return "-"
    value, low, high = (number(found[key], places) for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})" if low != "-" else value
