"""A result as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from drafter.evaluation.markdown import comparison_rows, with_interval
from drafter.evaluation.plots import BLANK, COLOURS, main_mode, plot_result
from drafter.evaluation.results import AVERAGE, names_of
from drafter.evaluation.tables import number, replay_cost

TITLES = {
    "block_sizes": "Block size in training against block size in decoding",
    "searches": "Several drafts a round",
    "accepted_length": "Accepted length by benchmark",
    "acceptance_by_position": "Acceptance by position",
    "waste": "Waste",
}
EXPLAINED = {
    "block_sizes": "Average accepted length of each trained row at each block size.",
    "searches": "Average accepted length, and tokens per second where the real loop ran, against "
    "the drafted tokens that the target verifies in a round.",
    "accepted_length": "Tokens per target pass, bonus token included, pooled over rounds; 1.0 is "
    "no drafter. Bars are 95 % intervals (bootstrap over prompts).",
    "acceptance_by_position": "Share of rounds that accept slot k among those that accepted "
    "slots 1 to k-1 and drafted k. Bands are 95 % intervals.",
    "waste": "Of all drafts that are right, the share that stands behind an error of its block and "
    "is lost to left-to-right verification.",
}

MANY = f"{EXPLAINED['acceptance_by_position'].partition(' Bands')[0]} {BLANK}"


def html_page(results: Sequence[Mapping[str, Any]], title: str = "Drafters, measured") -> str:
    """Returns a self-contained page: tables, pictures and decoded samples of each result.

    Args:
        results: One, or one for each grid of an ablation.
        title: Of the page.
    """
    body = [f"<h1>{_text(title)}</h1>"]
    for result in results:
        if result.get("grid"):
            body.append(f"<h1>{_text(result['grid'])}</h1>")
        body += _parts(result)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _parts(result: Mapping[str, Any]) -> list[str]:
    parts = [_facts(result, result["target"], result["settings"])]
    many = len(result["drafters"]) > len(COLOURS)
    explained = {**EXPLAINED, "acceptance_by_position": MANY} if many else EXPLAINED
    for name, png in plot_result(result).items():
        data = base64.b64encode(png).decode()
        parts.append(
            f"<section><h2>{TITLES[name]}</h2><p>{explained[name]}</p>"
            f'<img alt="{TITLES[name]}" src="data:image/png;base64,{data}"></section>'
        )
    for mode in ("replay", "decode"):
        names = list(names_of(result, mode))
        if names:
            parts.append(_figures_section(result, mode, names))
    parts.append(_differences(result))
    return [*parts, _where(result), _checks(result), _skipped(result), _samples(result)]


def _facts(result: Mapping[str, Any], target: Any, settings: Any) -> str:
    sampling = settings["sampling"]
    temperature = sampling["temperature"]
    how = "greedy" if not temperature else f"temperature {temperature:g}"
    how += f", top-k {sampling['top_k']}" if sampling["top_k"] else ""
    how += f", top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    facts = [
        ("target", f"{target['path']} ({result['dtype']})"),
        ("decoding", f"{how}, at most {settings['max_new_tokens']} new tokens"),
        ("where", result.get("device_name", "")),
        ("when", result.get("date", "")),
        ("revision", result.get("revision", "")),
        ("command", result.get("command", "")),
        ("cost", replay_cost(dict(result))),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts if str(value))
    return f"<dl>{rows}</dl>"


_ROUND_COLUMNS = (
    ("accepted length", "accepted_length", 3),
    ("per response", "accepted_length_per_response", 3),
    ("accepted per round", "accepted_per_round", 3),
    ("unclipped", "accepted_length_unclipped", 3),
    ("drafted per round", "drafted_per_round", 3),
    ("waste", "waste_ratio", 3),
    ("waste, all anchors", "waste_ratio_all_anchors", 3),
    ("waste of drafted", "waste_ratio_of_drafted", 3),
)
_SPEED_COLUMNS = (
    ("accepted length", "accepted_length", 3),
    ("tokens/s", "tokens_per_second", 1),
    ("target alone", "tokens_per_second_plain", 1),
    ("ratio", "speedup", 2),
    ("prefill ms", "ms_prefill", 1),
    ("draft ms", "ms_draft", 2),
    ("verify ms", "ms_verify", 2),
    ("bookkeeping ms", "ms_bookkeeping", 2),
)


def _figures_section(result: Mapping[str, Any], mode: str, names: Sequence[str]) -> str:
    """Replay's rounds in one table; the loop's rounds in another, and its speed in a third."""
    if mode == "replay":
        note = "Rounds read off the target's own responses."
        tables = _figures_table(result, mode, names, _ROUND_COLUMNS)
    else:
        note = (
            "One prompt at a time; every contender and the target alone in turn, synchronised, "
            "after warm-up. Draft, verify and bookkeeping are per round, prefill per response."
        )
        tables = _figures_table(result, mode, names, _SPEED_COLUMNS)
        tables += f"<h3>Rounds</h3>{_figures_table(result, mode, names, _ROUND_COLUMNS)}"
    what = "Replay" if mode == "replay" else "The real loop"
    return (
        f"<section><h2>{what}</h2><p>{note} 95 % intervals below each figure.</p>{tables}</section>"
    )


def _figures_table(
    result: Mapping[str, Any],
    mode: str,
    names: Sequence[str],
    columns: Sequence[tuple[str, str, int]],
) -> str:
    rows = []
    for drafter in result["drafters"]:
        found = drafter.get("figures", {}).get(mode)
        if not found:
            continue
        for name in (*names, AVERAGE):
            own = found[AVERAGE] if name == AVERAGE else found["sets"].get(name)
            if own:
                cells = [_cell(own.get(key), digits) for _, key, digits in columns]
                named = [_text(drafter["name"]), _text(name)]
                rows.append((name == AVERAGE, [*named, *cells, str(own["responses"])]))
    return _table(["drafter", "set", *(head for head, _, _ in columns), "responses"], rows)


def _differences(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["comparisons"] if row["figure"] == "accepted_length"]
    if not rows:
        return ""
    head, body = comparison_rows(rows)
    marked = [
        (row[3] == AVERAGE, [_text(cell) for cell in row[:-1]] + [_verdict(row[-1])])
        for row in body
    ]
    return (
        "<section><h2>Differences</h2><p>Accepted length on the same prompts, paired. A verdict is "
        "given only where the 95 % interval leaves 0 out; with few prompts it often does not.</p>"
        f"{_table(head, marked, words=True)}</section>"
    )


def _verdict(word: str) -> str:
    kind = {"better": "good", "worse": "bad"}.get(word, "none")
    return f'<span class="{kind}">{_text(word)}</span>'


def _where(result: Mapping[str, Any]) -> str:
    mode = main_mode(result)
    rows: list[tuple[bool, list[str]]] = []
    for drafter in result["drafters"]:
        found = drafter.get("figures", {}).get(mode, {})
        for row in found.get("by_context", []):
            what = f"up to {row['up_to']} tokens" if row["up_to"] else "longer contexts"
            length = with_interval(row["accepted_length"])
            cells = [drafter["name"], what, length, f"{row['rounds']:.0f}"]
            rows.append((False, list(map(_text, cells))))
        for row in found.get("by_turn", []):
            what = f"{row['set']}, turn {row['turn']}"
            cells = [drafter["name"], what, with_interval(row["accepted_length"]), ""]
            rows.append((False, list(map(_text, cells))))
    if not rows:
        return ""
    table = _table(["drafter", "where", "accepted length", "rounds"], rows)
    return f"<section><h2>By context length and turn</h2>{table}</section>"


def _checks(result: Mapping[str, Any]) -> str:
    parts = []
    for key, title in (
        ("audit", "Speculative text against the target's own"),
        ("agreement", "The real loop against replay"),
    ):
        rows: list[tuple[bool, list[str]]] = []
        listed = []
        for found in result.get(key) or []:
            counts = [found[k] for k in ("responses", "identical", "explained", "unexplained")]
            rows.append((False, [_text(found["drafter"]), *map(str, counts)]))
            for row in found["divergences"]:
                state = "explained" if row["explained"] else "NOT explained"
                state += "" if row["reproduced"] else " (it did not happen again)"
                listed.append(
                    f"<li>{_text(found['drafter'])}: {_text(row['set_name'])} "
                    f"{row['prompt_id']}, turn {row['turn'] + 1}, token {row['position']}, "
                    f"{_text(row['what'])}: tokens {row['tokens'][0]} and {row['tokens'][1]}, gap "
                    f"{row['gap']:.3g}, bound {row['bound']:.3g}, noise ratio "
                    f"{number(row['noise_ratio'], 2)}: {state}</li>"
                )
        if rows:
            head = ["drafter", "responses", "identical", "explained", "unexplained"]
            parts.append(f"<section><h2>{title}</h2>{_table(head, rows)}")
            if listed:
                parts.append(
                    f"<details><summary>Every divergence</summary><ul>{''.join(listed)}</ul>"
                    "</details>"
                )
            parts.append("</section>")
    overlap = result.get("overlap") or {}
    rows = [
        (False, [_text(drafter), _text(name), *(str(found[k]) for k in _OVERLAP)])
        for drafter, sets in overlap.items()
        if isinstance(sets, dict)
        for name, found in sets.items()
    ]
    if rows:
        head = ["drafter", "set", "prompts", "wholly in the training rows", "a run of 13 words"]
        parts.append(f"<section><h2>Training and evaluation overlap</h2>{_table(head, rows)}")
        parts.append("</section>")
    return "".join(parts)


_OVERLAP = ("prompts", "whole", "shared")


def _skipped(result: Mapping[str, Any]) -> str:
    reasons = Counter((row["set_name"], row["reason"]) for row in result["skipped"])
    items = [
        f"<li>{_text(name)}: {count} x {_text(why)}</li>" for (name, why), count in reasons.items()
    ]
    items += [f"<li>{_text(why)}</li>" for why in result.get("misfits", [])]
    return f"<section><h2>Left out</h2><ul>{''.join(items)}</ul></section>" if items else ""


def _samples(result: Mapping[str, Any]) -> str:
    parts = []
    for drafter in result["drafters"]:
        shown = [s for s in drafter.get("samples", []) if s["mode"] == main_mode(result)]
        shown.sort(key=lambda sample: (sample["set_name"], sample["prompt_id"]))
        for sample in shown:
            text = "".join(
                f"<mark>{_text(piece)}</mark>" if accepted else _text(piece)
                for piece, accepted in sample["pieces"]
            )
            asked = sample["prompt"][-600:]
            parts.append(
                f"<details><summary>{_text(drafter['name'])}: {_text(sample['set_name'])}, prompt "
                f"{sample['prompt_id']}</summary><pre class=asked>{_text(asked)}</pre>"
                f"<pre>{text}</pre></details>"
            )
    if not parts:
        return ""
    parts[0] = parts[0].replace("<details>", "<details open>", 1)
    return (
        "<section><h2>Samples</h2><p><mark>Coloured</mark> runs were drafted and accepted; the "
        f"rest the target wrote itself.</p>{''.join(parts)}</section>"
    )


def _table(
    head: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]], words: bool = False
) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=total' if total else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for total, row in rows
    )
    return (
        f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(found: Mapping[str, Any] | None, places: int) -> str:
    if not found or found["value"] is None or found["value"] != found["value"]:
        return "-"
    low, high = number(found["low"], places), number(found["high"], places)
    interval = f"<small>{low} to {high}</small>" if low != "-" else ""
    return f"{number(found['value'], places)}{interval}"


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0}
main{max-width:1280px;margin:0 auto;padding:1rem 1.2rem 4rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
h1{font-size:1.6rem;margin:.5rem 0 1rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0}
dt{color:#667}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:right;border-bottom:2px solid #ccd;padding:.3rem .5rem;
vertical-align:bottom}
td{text-align:right;border-bottom:1px solid #eef;padding:.25rem .5rem;vertical-align:top;
white-space:nowrap}
th:nth-child(-n+2),td:nth-child(-n+2),.words th,.words td{text-align:left}
td small{display:block;color:#778;font-size:.78em}
tr.total td{font-weight:600;border-bottom:2px solid #ccd}
img{max-width:100%;height:auto}
mark{background:#bfe5c8;color:inherit;border-radius:2px;padding:1px 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7fa;padding:.7rem;border-radius:6px;
font-size:13px;line-height:1.55}
pre.asked{color:#667;background:none;border-left:3px solid #dde;border-radius:0}
.good{color:#14713a;font-weight:600}.bad{color:#b3261e;font-weight:600}.none{color:#667}
summary{cursor:pointer;margin:.3rem 0}
@media(prefers-color-scheme:dark){body{background:#15171b;color:#ddd}pre{background:#1e2127}
td{border-color:#2a2e36}th,tr.total td{border-color:#444b57}mark{background:#1f5a37}
img{background:#fff;border-radius:6px}}
"""
