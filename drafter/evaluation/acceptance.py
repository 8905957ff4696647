"""What a drafter was measured to accept, kept beside an export: `acceptance.json`, and on what:
`acceptance_prompts.jsonl`.

An engine that accepts much less on the same prompts is set up wrongly; one that accepts as much has
the drafter that was measured. If evaluate.py, too, accepts less, the weights are not those.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, takewhile, zip_longest
from operator import mul
from pathlib import Path
from typing import Any

from drafter.evaluation.asked import row_place
from drafter.evaluation.results import without_nan
from drafter.evaluation.tables import number

ACCEPTANCE = "acceptance.json"
ACCEPTANCE_PROMPTS = "acceptance_prompts.jsonl"
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
    "pooled": "all sets together, as an engine's counters have them: rounds; accepted_length and "
    "accepted_length_unclipped as above; accepted_at, by slot, of all rounds",
    "prompts": "`file` beside this one: a prompt a line, as token ids and as text, with the "
    "target's own answer and what this drafter is expected to do on it (sums: rounds, emitted "
    "tokens, unclipped, and rounds that accepted each slot)",
}
"""What the figures are, for a reader of the file alone."""
_LENGTHS = ("emitted", "unclipped")
_POOLED = ("accepted_length", "accepted_length_unclipped")
_SAID = ("target", "settings", "dtype", "batch_size", "command", "date", "revision", "torch")


def expected_acceptance(result: Mapping[str, Any], prompts: int = 0) -> dict[str, Any]:
    """Returns the content of acceptance.json.

    Args:
        result: Of `evaluate.py report`, with this drafter's figures only
            (docs/results-format.md).
        prompts: Lines of acceptance_prompts.jsonl; 0 for none beside it.
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
                    "pooled": _pooled(drafter["responses"][mode]),
                }
            )
    said = {key: result[key] for key in (*_SAID, "device_name") if key in result}
    beside = {"prompts": {"file": ACCEPTANCE_PROMPTS, "lines": prompts}} if prompts else {}
    content: dict[str, Any] = without_nan({"how": HOW, **said, **beside, "measured": measured})
    return content


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures of responses taken together; rows are tallies as plain values."""
    sums = {key: sum(row["counts"][key] for row in rows) for key in ("rounds", *_LENGTHS)}
    rounds = sums["rounds"] or float("nan")
    return {
        "rounds": sums["rounds"],
        "accepted_length": sums["emitted"] / rounds,
        "accepted_length_unclipped": sums["unclipped"] / rounds,
        "accepted_at": [
            sum(slot) / rounds
            for slot in zip_longest(*(row["accepted_at"] for row in rows), fillvalue=0.0)
        ],
    }


def expected_prompts(
    result: Mapping[str, Any], prompts: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the rows of acceptance_prompts.jsonl; none unless each response's prompt is there.

    Args:
        result: As in `expected_acceptance`. Of several ways to draft or to measure, the counts of
            the first with one whole draft a round stand in the rows, else the first's.
        prompts: Rows of the result's prompts (asked.asked_rows).
    """
    known = {row_place(row): row for row in prompts}
    found = []
    drafters = result["drafters"]
    chosen = next(filter(_is_plain, drafters), drafters[0])
    for tally in next(iter(chosen["responses"].values()), ()):
        place = tally["set_name"], tally["prompt_id"], tally["turn"], tally["prompt"]
        if place not in known:
            return []
        counts = {key: tally["counts"][key] for key in ("rounds", *_LENGTHS)}
        expected = {**counts, "accepted_at": tally["accepted_at"]}
        found.append({**known[place], "expected": without_nan(expected)})
    return found


def _is_plain(one: Mapping[str, Any]) -> bool:
    """Returns whether one whole draft a round was measured, as engines have it."""
    return not one.get("search") and not one.get("draft_length")


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
        pooled = one.get("pooled")
        if pooled and len(one["sets"]) > 2:  # more than one beside the average
            length, loose = (number(pooled[key], 3) for key in _POOLED)
            lines.append(f"  all sets pooled: accepted length {length}, last round not cut {loose}")
            lines.append(f"    by slot, of all rounds: {_percent(pooled['accepted_at'])} %")
    return lines


def prompts_lines(folder: Path, saved: Mapping[str, Any], block_size: int) -> list[str]:
    """Returns what was measured on, and how to tell a checkpoint's fault from an engine's.

    Source: vLLM's metrics of speculative decoding (`vllm:spec_decode_*`) and SGLang's
    `spec_verify_ct` of a reply.

    Args:
        folder: Of the export.
        saved: Content of its acceptance.json.
        block_size: K of the export's config.json.
    """
    file = folder / ACCEPTANCE_PROMPTS
    if not file.is_file():
        return [f"prompts: no {ACCEPTANCE_PROMPTS}; make the report anew and export with --results"]
    lines = [
        f"prompts: {file} ({len(file.read_text().splitlines())}, as token ids, with the target's "
        "own answers)",
        *([f"  measured by: {saved['command']}"] if saved.get("command") else []),
    ]
    plain = next(filter(_is_plain, saved["measured"]), None)
    if plain is None:
        return [
            *lines,
            "  an engine drafts one block a round, which was not measured: make the report without "
            "--search and export with its --results",
        ]
    if len(saved["measured"]) > 1:
        lines.append(
            f"  to repeat, of the above: {plain['mode']}, K = {plain['block_size']}, one whole "
            "draft a round"
        )
    settings = saved.get("settings") or {}
    sampling = settings.get("sampling") or {}
    limit, temperature = settings.get("max_new_tokens"), sampling.get("temperature")
    words = ["python", "evaluate.py", "report", "--ckpt", str(folder), "--prompts", str(file)]
    for flag, value, default in (
        ("--max-new-tokens", limit, None),
        ("--dtype", saved.get("dtype"), None),
        ("--temperature", temperature, 0.0),
        ("--top-k", sampling.get("top_k"), 0),
        ("--top-p", sampling.get("top_p"), 1.0),
        ("--block-size", plain["block_size"], block_size),
        ("--mode", plain["mode"], "replay"),
    ):
        words += [flag, str(value)] if value not in (None, default) else []
    sent = [f"temperature {temperature}", f"at most {limit} tokens"]
    sent += [f"top_k {sampling['top_k']}"] if sampling.get("top_k") else []
    sent += [f"top_p {sampling['top_p']}"] if sampling.get("top_p", 1.0) != 1.0 else []
    other_size = (
        f" (started with {plain['block_size'] - 1} speculative tokens)"
        if plain["block_size"] != block_size
        else ""
    )
    lines += [
        f"  1. here: {shlex.join(words)}",
        f"  2. in the engine{other_size}: send each line's prompt_ids, {', '.join(sent)}, nothing "
        "else; then read its counters",
        "    vLLM: 1 + vllm:spec_decode_num_accepted_tokens / vllm:spec_decode_num_drafts is the "
        "accepted length, last round not cut;",
        "      vllm:spec_decode_num_accepted_tokens_per_pos / the same is acceptance by slot, of "
        "all rounds",
        "    SGLang: completion_tokens / spec_verify_ct of a reply's meta_info is about the "
        "accepted length",
    ]
    if temperature:
        lines.append(
            f"  both sample their answers anew: hold them to the intervals of {ACCEPTANCE}; below "
            "in 1: the checkpoint or the target is at fault; only in 2: the engine's set-up (its "
            "target, dtype or sampling)"
        )
    else:
        lines.append(
            "  less than above in 1: the checkpoint or the target is at fault; only in 2: the "
            "engine's set-up (where texts differ from response_ids: its target, dtype or sampling)"
        )
    return lines


def _percent(rates: list[float]) -> str:
    return " ".join(f"{100 * rate:.0f}" for rate in rates)
