"""Tokens per second of speculative decoding, of the target alone, and of transformers' generate.

python -m benchmarks.decode --ckpt RUN --benchmark-dir benchmarks/ --limit 8 --dtype bfloat16
python -m benchmarks.decode --toy                                  # a tiny target, on the CPU

All decode the same prompts greedily, in one process, one prompt at a time; ours in rows of 8 and 32
too. Before anything is timed, every token that a way emits is held to the target's own logits of
the whole text (in fp32 the responses of all of ours are the same besides). Figures: tokens per
second, accepted length tau, and the time of a pass of the target alone, of a draft and of a
verification, each recorded and launched by itself.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import write_lines
from data.eval_prompts import load_eval_prompts
from data.sharing import load_target
from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.loading import check_fits, load_drafter
from drafter.evaluation.markdown import markdown_rows
from drafter.graphs import CudaRecorder
from drafter.model import Drafter
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from drafter.target_session import frozen
from evaluate import where_and_when

Prompts = Sequence[Sequence[int]]
ALONE, SPECULATIVE = "target alone", "speculative"
LOGIT_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Most that a greedy token's logit may lie below the largest one of an uncached pass, by dtype."""


ROUNDS_OF_ROWS = 3  # prompts for each row, at least: the last ones leave rows empty


@dataclass
class Way:
    """A way to decode.

    Attributes:
        name: In the table.
        decode: Prompts to response ids.
        rows: Prompts side by side.
        ours: Whether it is this package's.
        rounds: Where it leaves its numbers of rounds, if it drafts.
    """

    name: str
    decode: Callable[[Prompts], list[list[int]]]
    rows: int = 1
    ours: bool = True
    rounds: list[int] | None = None


def ways(
    target: Target, drafter: Drafter, longest: int, new: int, rows: Sequence[int]
) -> list[Way]:
    """Returns what is measured.

    Args:
        target: The frozen target.
        drafter: On its device and in its dtype.
        longest: Tokens of the longest prompt.
        new: Most tokens of a response.
        rows: Of ours on fixed shapes.
    """
    ends = target.eos_token_ids

    def plain_loop(prompts: Prompts) -> list[list[int]]:
        return [
            decode_plainly(CachedTarget(target), prompt, max_new_tokens=new, eos_token_ids=ends).ids
            for prompt in prompts
        ]

    def loop(prompts: Prompts) -> list[list[int]]:
        out = []
        for prompt in prompts:
            engine = CachedTarget(target, drafter.config.target_layer_ids)
            own = CachedDrafter(drafter, target, engine)
            out.append(
                decode_speculatively(
                    engine, own, prompt, max_new_tokens=new, eos_token_ids=ends
                ).ids
            )
        return out

    def transformers_way(**settings: Any) -> Callable[[Prompts], list[list[int]]]:
        def generate(prompts: Prompts) -> list[list[int]]:
            out = []
            for prompt in prompts:
                ids = torch.tensor([list(prompt)], device=target.device)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer = target.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=new,
                        do_sample=False,
                        repetition_penalty=1.0,  # some models' own settings have another
                        eos_token_id=list(ends),
                        pad_token_id=ends[0],
                        **settings,
                    )
                out.append(answer[0, len(prompt) :].tolist())
            return out

        return generate

    found = [
        Way("transformers, target alone", transformers_way(), ours=False),
        Way(
            "transformers, prompt lookup",
            transformers_way(prompt_lookup_num_tokens=drafter.config.num_drafted),
            ours=False,
        ),
        Way("target alone, kernel by kernel", plain_loop),
        Way("speculative, kernel by kernel", loop),
    ]
    if target.device.type == "cuda":  # generate compiles by itself then
        static = transformers_way(cache_implementation="static")
        found.insert(1, Way("transformers, target alone, static cache, compiled", static, 1, False))
    for count in rows:
        for name, one in ((ALONE, None), (SPECULATIVE, drafter)):
            decoder = StaticDecoder(target, one, rows=count, length=longest + new)
            found.append(_static_way(name, decoder, new))
    return found


def _static_way(name: str, decoder: StaticDecoder, new: int) -> Way:
    rounds: list[int] = []

    def decode(prompts: Prompts) -> list[list[int]]:
        decoded = decoder.decode(prompts, max_new_tokens=new)
        rounds[:] = [len(one.rounds) for one in decoded]
        return [one.ids for one in decoded]

    drafts = decoder.drafter is not None
    return Way(name, decode, decoder.rows, rounds=rounds if drafts else None)


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


def pass_times(target: Target, drafter: Drafter, longest: int, new: int) -> dict[str, float]:
    """Returns ms of a pass of the target alone, of a draft and of a verification.

    Rows stand still meanwhile, at half of their length.
    """
    times = {}
    for one, parts in (
        (None, {"plain": "verify"}),
        (drafter, {"draft": "draft", "verify": "verify"}),
    ):
        decoder = StaticDecoder(target, one, length=longest + new)
        decoder.stand_at((longest + new) // 2)
        for name, part in parts.items():
            times[f"ms_{name}"] = _milliseconds(getattr(decoder, part), target.device)
    return times


def _milliseconds(work: Callable[[], None], device: torch.device, times: int = 50) -> float:
    def done() -> None:
        with frozen(device):
            work()

    run = done
    if device.type == "cuda":
        recorder = CudaRecorder()
        recorder.rehearse(done)
        run = recorder(done)
        torch.cuda.synchronize()
    else:
        times = 10
    run()
    begun = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times * 1e3


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
    if way.rounds:
        out["tau"] = (tokens - len(responses)) / sum(way.rounds)
    return out


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns how the results stand to what a loop without loss between its passes would give."""
    one = {row["way"]: row for row in rows if row["rows"] == 1}
    ours, alone = one[SPECULATIVE], one[ALONE]
    gain = ours["tokens_per_second"] / alone["tokens_per_second"]
    passes = ours["ms_plain"] / (ours["ms_draft"] + ours["ms_verify"])
    rival = max(
        (row for name, row in one.items() if name.startswith("transformers")),
        key=lambda row: float(row["tokens_per_second"]),
    )
    lines = [
        f"speculative over the target alone, both on fixed shapes: {gain:.2f}; tau x t_plain / "
        f"(t_draft + t_verify) is {ours['tau'] * passes:.2f}, so "
        f"{gain / (ours['tau'] * passes):.2f} of it is kept; {gain / ours['tau']:.2f} of tau",
        f"over the fastest of transformers ({rival['way']}): "
        f"{ours['tokens_per_second'] / rival['tokens_per_second']:.2f}",
    ]
    for count in sorted({row["rows"] for row in rows} - {1}):
        both = {row["way"]: row["tokens_per_second"] for row in rows if row["rows"] == count}
        lines.append(f"rows {count}: {both[SPECULATIVE] / both[ALONE]:.2f} of the target alone")
    return lines


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as a markdown table."""
    head = ("way", "rows", "tokens/s", "tau", "same responses")
    lines = [
        (
            row["way"],
            str(row["rows"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['tau']:.3f}" if "tau" in row else "",
            f"{row['same']:.0%}",
        )
        for row in rows
    ]
    return "\n".join(markdown_rows(head, lines))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Checks and measures every way; returns the rows, which are in the output too."""
    target, drafter, prompts = _toy(options) if options.toy else _real(options)
    longest = max(map(len, prompts))
    new = options.max_new_tokens
    output = Path(options.output) if options.output else None
    record = where_and_when(target.device) | {"dtype": str(target.dtype).removeprefix("torch.")}
    record |= pass_times(target, drafter, longest, new)
    rows: list[dict[str, Any]] = []
    few = prompts[: options.checked]
    all_ways = ways(target, drafter, longest, new, options.rows)
    expected = next(w for w in all_ways if w.name == "target alone, kernel by kernel").decode(few)
    for way in all_ways:
        row: dict[str, Any] = {"way": way.name, "rows": way.rows}
        row |= check(target, way, few, expected)
        row |= measure(way, prompts, target.device) | record
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_lines(output, rows)
    return rows


def _real(options: argparse.Namespace) -> tuple[Target, Drafter, list[list[int]]]:
    loaded = load_drafter(options.ckpt)
    path = options.target or loaded.target_path
    if path is None:
        raise UserError(f"{options.ckpt} does not say what its target is; pass --target.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(
        path,
        gguf_file=None if options.target else loaded.target_gguf_file,
        dtype=options.dtype or loaded.target_dtype,
        device=device,
        revision=None,
        trust_remote_code=False,
    )
    check_fits(loaded, target)
    prompts, _ = load_eval_prompts(
        target,
        options.max_new_tokens,
        benchmark_dir=options.benchmark_dir,
        files=options.prompts or (),
        limit=options.limit,
    )
    drafter = loaded.drafter.to(target.device, target.dtype).eval().requires_grad_(False)
    return target, drafter, [list(prompt.ids) for prompt in prompts]


def _toy(options: argparse.Namespace) -> tuple[Target, Drafter, list[list[int]]]:
    """Returns a tiny target and a drafter that has learnt some of its responses."""
    from drafter.evaluation.trajectories import EvalPrompt
    from drafter.target_loading import Loaded
    from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
    from tests.tiny_drafters import overfitted_drafter

    config = tiny_config(max_position_embeddings=1024)
    target = Target(Loaded(tiny_model(config), tiny_tokenizer()), "tiny", None)
    prompts = [[5 + i, 9, 3 + 2 * i, 40 - i] for i in range(options.limit)]
    answered = [EvalPrompt("toy", i, ids) for i, ids in enumerate(prompts)]
    return target, overfitted_drafter(target, answered, new_tokens=options.max_new_tokens), prompts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table and the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", help="drafter: a run, a checkpoint or a drafter's folder")
    parser.add_argument("--target", help="default: the one recorded with the drafter")
    parser.add_argument("--benchmark-dir", metavar="DIR", help="folder of <name>.jsonl")
    parser.add_argument("--prompts", nargs="+", help="prompt files")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--checked", type=int, default=4, help="prompts held to the target's own")
    parser.add_argument("--dtype", help="of target and drafter; default: the run's target's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", help="JSON lines")
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
