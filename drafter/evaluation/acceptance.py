"""What a drafter was measured to accept, kept beside an export: `acceptance.json`.

An engine that accepts much less on the same prompts is set up wrongly; one that accepts as much has
the drafter that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, takewhile
from operator import mul
from typing import Any

from drafter.evaluation.results import without_nan
from drafter.evaluation.tables import number

ACCEPTANCE = "acceptance.json"
FIGURES = ("prompts", "responses", "accepted_length", "accepted_length_unclipped", "accept_rate")
HOW = {
    "replay": "the target answered every prompt alone; one drafter pass over its answer gave every "
    "round: at temperature 0 those of the decoding loop, else exact expectations",
    "decode": "the decoding loop itself, prompt by prompt",
    "accepted_length": "(response tokens - 1) / rounds: tokens per target pass, the target's own "
    "token included",
    "accepted_length_unclipped": "as engines count: the last round is not cut at the response's "
    "end",
    "accept_rate": "by drafted slot, from the first: rounds that accepted it, of those that "
    "accepted all before it and drafted it",
}
"""What the figures are, for a reader of the file alone."""
_SAID = ("target", "settings", "dtype", "batch_size", "command", "date", "revision", "torch")


def expected_acceptance(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of acceptance.json.

    Args:
        result: Of `evaluate.py report`, with this drafter's figures only
            (docs/results-format.md).
    """
    measured = []
    for drafter in result["drafters"]:
        for mode, found in drafter.get("figures", {}).items():
            sets = {**found.get("sets", {}), "average": found.get("average", {})}
            kept = {
                name: {key: figures[key] for key in FIGURES if key in figures}
                for name, figures in sets.items()
            }
            measured.append(
                {
                    "fingerprint": drafter.get("fingerprint"),
                    "mode": mode,
                    "block_size": drafter.get("block_size"),
                    "search": drafter.get("search"),
                    "draft_length": drafter.get("draft_length"),
                    "sets": kept,
                }
            )
    said = {key: result[key] for key in (*_SAID, "device_name") if key in result}
    content: dict[str, Any] = without_nan({"how": HOW, **said, "measured": measured})
    return content


def acceptance_lines(saved: Mapping[str, Any]) -> list[str]:
    """Returns acceptance.json's content as lines of text."""
    settings = saved.get("settings") or {}
    sampling = settings.get("sampling") or {}
    lines = []
    for one in saved["measured"]:
        how = [
            f"K = {one['block_size']}",
            str(saved.get("dtype")),
            f"temperature {sampling.get('temperature')}",
            f"up to {settings.get('max_new_tokens')} tokens",
        ]
        how += [str(one["search"])] if one.get("search") else []
        how += ["drafts cut by a rule"] if one.get("draft_length") else []
        lines.append(f"expected acceptance ({one['mode']}, {', '.join(how)}):")
        for name, figures in one["sets"].items():
            length, loose = (
                number((figures.get(key) or {}).get("value"), 3)
                for key in ("accepted_length", "accepted_length_unclipped")
            )
            lines.append(f"  {name}: accepted length {length}, last round not cut {loose}")
            values = [rate["value"] for rate in figures.get("accept_rate", [])]
            rates = list(takewhile(lambda rate: rate is not None, values))  # no round went further
            if rates:
                lines.append(f"    by slot, of rounds that reach it: {_percent(rates)} %")
            if rates and name != "average":  # a product of averages is no set's
                reached = accumulate(rates, mul)
                lines.append(f"    by slot, of all rounds: {_percent(list(reached))} %")
    return lines


def _percent(rates: list[float]) -> str:
    return " ".join(f"{100 * rate:.0f}" for rate in rates)
