"""Tokens per second of speculative decoding, of the target alone, and of transformers' generate.

python -m benchmarks.decode --ckpt RUN --benchmark-dir benchmarks/ --limit 8 --dtype bfloat16
python -m benchmarks.decode --ckpt UNIFORM FULL --benchmark-dir benchmarks/ --limit 8 --rows 1 \\
    --search plain tree self-select --budget 15 30 60 120 --drafts 2 4 8 \\
    --ways recorded --plot tokens_per_second.png
python -m benchmarks.decode --toy                                  # a tiny target, on the CPU

All decode the same prompts greedily, in one process, one prompt at a time; ours with one draft a
round in rows of 8 and 32 too. Before anything is timed, every token that a way emits is held to the
target's own logits of the whole text (in fp32 the responses of all of ours are the same besides).
Figures: tokens per second, also as a multiple of the target's alone on fixed shapes; accepted
length tau; drafted tokens a round (a tree is padded to its budget, several drafts to all their
tokens, and verified so); and the time of a pass of the target alone, of a draft and of a
verification, each recorded and launched by itself. Trees and cut drafts have work of the host's
between these two, which is given, and wait for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_ways import (
    ALONE,
    OTHERS,
    SPECULATIVE,
    Prompts,
    Way,
    decode_alone,
    drafted,
    milliseconds,
    ways,
)
from benchmarks.lines import write_lines
from data.eval_prompts import load_eval_prompts
from data.sharing import load_target
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.contenders import (
    add_search_options,
    searches_of,
    with_draft_length,
    with_searches,
)
from drafter.evaluation.loading import LoadedDrafter, check_fits, load_drafter
from drafter.evaluation.markdown import markdown_rows
from drafter.evaluation.plots import plot_searches
from drafter.evaluation.tables import name_apart
from drafter.files import write_atomic
from drafter.sampling import GREEDY
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from evaluate import where_and_when

LOGIT_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Most that a greedy token's logit may lie below the largest one of an uncached pass, by dtype."""


ROUNDS_OF_ROWS = 3  # prompts for each row, at least: the last ones leave rows empty


@torch.no_grad()
def largest_gap(target: Target, prompts: Prompts, responses: Sequence[Sequence[int]]) -> float:
    """Returns how far an emitted token's logit lies below the largest, at most.

    By an uncached pass over the whole text: what greedy decoding would have chosen, but for
    rounding.
    """
    gaps = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=target.device)
        last, _ = target.run((), input_ids=ids)
        logits = target.head.logits(last[0, len(prompt) - 1 : -1])
        chosen = torch.tensor(list(response), device=target.device)[:, None]
        gaps.append(float((logits.amax(-1) - logits.gather(-1, chosen)[:, 0]).max()))
    return max(gaps)


def check(
    target: Target, way: Way, prompts: Prompts, expected: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Returns what came of holding a way to the target's own.

    Returns:
        `same`, the share of responses that are the expected ones to the token; and `gap`, see
        `largest_gap`.

    Raises:
        AssertionError: It is ours, and a token is not the target's own; or, in fp32, a response is
            another. (Of others it is a result.)
    """
    responses = way.decode(prompts)
    gap = largest_gap(target, prompts, responses)
    bound = LOGIT_GAP.get(target.dtype, 1e-3)
    if way.ours:
        assert gap <= bound, f"{way.name}: a token's logit lies {gap:.3f} below the target's choice"
    same = [list(a) == list(b) for a, b in zip(responses, expected, strict=True)]
    if way.ours and target.dtype == torch.float32:
        assert all(same), f"{way.name}: {same.count(False)} responses are not the target's own"
    return {"same": sum(same) / len(same), "gap": gap}


def measure(way: Way, prompts: Prompts, device: torch.device) -> dict[str, Any]:
    """Returns what a way takes for all prompts, prefill included; several times over for rows."""
    way.decode([max(prompts, key=len)])  # recording; transformers compiles anew for a longer one
    if way.rows > 1:
        prompts = list(prompts) * -(-ROUNDS_OF_ROWS * way.rows // len(prompts))
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    responses = way.decode(prompts)
    seconds = time.perf_counter() - begun
    tokens = sum(map(len, responses))
    out: dict[str, Any] = {"tokens": tokens, "tokens_per_second": tokens / seconds}
    rounds = sum(len(one.rounds) for one in way.decoded or ())
    if way.decoded and rounds:
        out["tau"] = (tokens - len(responses)) / rounds
        out["drafted"] = drafted(way.decoded)
        host = sum(one.seconds.get("bookkeeping", 0.0) for one in way.decoded)
        if host:
            out["ms_host"] = host / rounds * 1e3
    return out | (way.passes() if way.passes else {})


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `speedup` to all: over the target alone on fixed shapes, with as many rows."""
    alone = {row["rows"]: row["tokens_per_second"] for row in rows if row["way"] == ALONE}
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / alone[row["rows"]]


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns how the results stand to what a loop without loss between its passes would give."""
    single = [row for row in rows if row["rows"] == 1]
    alone = next(row for row in single if row["way"] == ALONE)
    others = [row for row in single if row["way"].startswith(OTHERS)]
    names = list(dict.fromkeys(row["drafter"] for row in rows if "drafter" in row))
    lines = []
    for name in names:
        lead = f"{name}: " if len(names) > 1 else ""
        own = [row for row in rows if row.get("drafter") == name and "drafts" in row]
        one = {row["way"]: row for row in own if row["rows"] == 1}
        if (ours := one.get(SPECULATIVE)) is not None:
            lines += [lead + line for line in _bars_of(ours, alone, others)]
        if len(one) > 1:
            best = max(one.values(), key=lambda row: float(row["tokens_per_second"]))
            lines.append(
                f"{lead}fastest: {best['way']}, "
                f"{best['tokens_per_second'] / alone['tokens_per_second']:.2f} of the target alone"
            )
        for row in own:
            if row["rows"] > 1:
                rival = next(r for r in rows if (r["way"], r["rows"]) == (ALONE, row["rows"]))
                gain = row["tokens_per_second"] / rival["tokens_per_second"]
                lines.append(f"{lead}rows {row['rows']}: {gain:.2f} of the target alone")
    return lines


def _bars_of(
    ours: dict[str, Any], alone: dict[str, Any], others: Sequence[dict[str, Any]]
) -> list[str]:
    gain = ours["tokens_per_second"] / alone["tokens_per_second"]
    passes = ours["ms_plain"] / (ours["ms_draft"] + ours["ms_verify"])
    lines = [
        f"speculative over the target alone, both on fixed shapes: {gain:.2f}; tau x t_plain / "
        f"(t_draft + t_verify) is {ours['tau'] * passes:.2f}, so "
        f"{gain / (ours['tau'] * passes):.2f} of it is kept; {gain / ours['tau']:.2f} of tau"
    ]
    if others:
        rival = max(others, key=lambda row: float(row["tokens_per_second"]))
        lines.append(
            f"over the fastest of transformers ({rival['way']}): "
            f"{ours['tokens_per_second'] / rival['tokens_per_second']:.2f}"
        )
    return lines


COLUMNS = {
    "drafter": "{}",
    "way": "{}",
    "rows": "{}",
    "tokens_per_second": "{:.1f}",
    "speedup": "{:.2f}",
    "tau": "{:.3f}",
    "drafted": "{:.1f}",
    "ms_draft": "{:.2f}",
    "ms_host": "{:.2f}",
    "ms_verify": "{:.2f}",
    "same": "{:.0%}",
}
"""Figures of a row, and how they are written."""
HEADS = {
    "tokens_per_second": "tokens/s",
    "speedup": "of the target alone",
    "drafted": "drafted a round",
    "ms_draft": "draft, ms",
    "ms_host": "host, ms",
    "ms_verify": "verify, ms",
    "same": "same responses",
}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as a markdown table; columns that would be empty are left out."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    if len({row["drafter"] for row in rows if "drafter" in row}) < 2:
        keys = [key for key in keys if key != "drafter"]
    lines = [
        tuple(COLUMNS[key].format(row[key]) if key in row else "" for key in keys) for row in rows
    ]
    return "\n".join(markdown_rows(tuple(HEADS.get(key, key) for key in keys), lines))


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Returns a PNG: accepted length and tokens per second against drafted tokens a round."""
    found: dict[str, dict[str, list[Any]]] = {}
    single = [row for row in rows if row["rows"] == 1]
    for row in sorted(single, key=lambda row: float(row.get("drafted", 0))):
        if "tau" in row:
            figures = {
                "accepted_length": {"value": row["tau"]},
                "tokens_per_second": {"value": row["tokens_per_second"]},
                "drafted_per_round": {"value": row["drafted"]},
            }
            found.setdefault(row["drafter"], {}).setdefault(row["drafts"], []).append(figures)
    alone = next(row["tokens_per_second"] for row in single if row["way"] == ALONE)
    return plot_searches(found, found, alone)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Checks and measures every way; returns the rows, which are in the output too."""
    searches = searches_of(options)
    target, drafters, prompts = _toy(options) if options.toy else _real(options)
    contenders = with_searches(drafters, searches)
    for file in options.draft_length or ():
        contenders += with_draft_length(drafters, file, GREEDY)
    longest = max(map(len, prompts))
    new = options.max_new_tokens
    output = Path(options.output) if options.output else None
    record = where_and_when(target.device) | {"dtype": str(target.dtype).removeprefix("torch.")}
    alone = StaticDecoder(target, None, length=longest + new)
    alone.stand_at(alone.length // 2)
    record["ms_plain"] = milliseconds(alone.verify, target.device)
    rows: list[dict[str, Any]] = []
    few = prompts[: options.checked]
    expected = decode_alone(target, new, few)
    recorded_only = options.ways == "recorded"
    for way in ways(target, contenders, longest, new, options.rows, recorded_only):
        row: dict[str, Any] = {"way": way.name, "rows": way.rows} | record
        row |= {"drafter": way.drafter} if way.drafter else {}
        row |= {"drafts": way.drafts} if way.drafts else {}
        row |= check(target, way, few, expected)
        row |= measure(way, prompts, target.device)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_lines(output, rows)
    add_speedups(rows)
    write_lines(output, rows)
    if options.plot:
        write_atomic(Path(options.plot), picture(rows))
    return rows


def _real(options: argparse.Namespace) -> tuple[Target, list[LoadedDrafter], list[list[int]]]:
    drafters = name_apart([load_drafter(path) for path in options.ckpt])
    naming = next((loaded for loaded in drafters if loaded.target_path), drafters[0])
    path = options.target or naming.target_path
    if path is None:
        raise UserError(f"{naming.name} does not say what its target is; pass --target.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(
        path,
        gguf_file=None if options.target else naming.target_gguf_file,
        dtype=options.dtype or naming.target_dtype,
        device=device,
        revision=None,
        trust_remote_code=False,
    )
    for loaded in drafters:
        check_fits(loaded, target)
        loaded.drafter.to(target.device, target.dtype).eval().requires_grad_(False)
    prompts, _ = load_eval_prompts(
        target,
        options.max_new_tokens,
        benchmark_dir=options.benchmark_dir,
        files=options.prompts or (),
        limit=options.limit,
    )
    return target, drafters, [list(prompt.ids) for prompt in prompts]


def _toy(options: argparse.Namespace) -> tuple[Target, list[LoadedDrafter], list[list[int]]]:
    """Returns a tiny target and a drafter that has learnt some of its responses."""
    from drafter.evaluation.trajectories import EvalPrompt
    from drafter.target_loading import Loaded
    from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
    from tests.tiny_drafters import overfitted_drafter

    config = tiny_config(max_position_embeddings=1024)
    target = Target(Loaded(tiny_model(config), tiny_tokenizer()), "tiny", None)
    prompts = [[5 + i, 9, 3 + 2 * i, 40 - i] for i in range(options.limit)]
    answered = [EvalPrompt("toy", i, ids) for i, ids in enumerate(prompts)]
    drafter = overfitted_drafter(target, answered, new_tokens=options.max_new_tokens)
    return target, [LoadedDrafter("toy", drafter, fingerprint="toy")], prompts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table and the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", nargs="+", help="drafters: runs, checkpoints or drafters' folders, side by side"
    )
    parser.add_argument("--target", help="default: the one recorded with the drafter")
    parser.add_argument("--benchmark-dir", metavar="DIR", help="folder of <name>.jsonl")
    parser.add_argument("--prompts", nargs="+", help="prompt files")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    add_search_options(parser)
    parser.add_argument(
        "--draft-length",
        nargs="+",
        metavar="FILE.json",
        help="what `evaluate.py calibrate` wrote for one of the drafters: its drafts cut so, too",
    )
    parser.add_argument(
        "--ways",
        choices=("all", "recorded"),
        default="all",
        help="recorded: leave out transformers and what runs kernel by kernel, which take longest",
    )
    parser.add_argument("--checked", type=int, default=4, help="prompts held to the target's own")
    parser.add_argument("--dtype", help="of target and drafter; default: the run's target's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", help="JSON lines")
    parser.add_argument("--plot", metavar="FILE.png", help="against drafted tokens a round")
    parser.add_argument("--toy", action="store_true", help="a tiny random target, on the CPU")
    options = parser.parse_args(arguments)
    options.max_new_tokens = options.max_new_tokens or (24 if options.toy else 256)
    with one_sentence_errors():
        if not options.toy and not options.ckpt:
            raise UserError("Name a drafter with --ckpt, or --toy for a small version.")
        if options.rows[0] != 1:
            raise UserError(
                f"--rows begins with {options.rows[0]}; one prompt at a time is needed."
            )
        rows = run(options)
        print("\n".join([show(rows), "", *bars(rows)]))


if __name__ == "__main__":
    main()
