"""Measures drafters: `python evaluate.py report --ckpt ... --prompts FILE...`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data.prompt_sets import load_prompts
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.report import load_drafter, report, table, without_nan
from drafter.evaluation.trajectories import TrajectorySettings
from drafter.files import cache_root, write_atomic
from drafter.sampling import Sampling
from drafter.target import Target


def parse(args: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; `report` is the default verb."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0].startswith("--"):
        args = ["report", *args]
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("report", help="accepted length of one or more drafters")
    verb.add_argument(
        "--ckpt",
        action="append",
        required=True,
        metavar="PATH",
        help="checkpoint (.ckpt), run folder, or drafter folder; repeatable",
    )
    verb.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE",
        help="prompt files; each is a set named by its stem",
    )
    verb.add_argument("--target", help="target; default: the one recorded in the checkpoint")
    verb.add_argument("--gguf-file", help="GGUF file inside the target's folder")
    verb.add_argument("--mode", choices=("replay", "decode"), default="replay")
    verb.add_argument("--limit", type=int, help="prompts of each set")
    verb.add_argument("--skip", type=int, default=0, help="prompts of each set passed over first")
    verb.add_argument("--max-new-tokens", type=int, default=256)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    verb.add_argument("--top-k", type=int, default=0)
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--dtype", help="of target and drafter; default: the run's target's")
    verb.add_argument("--device", help="default: cuda where there is one, else cpu")
    verb.add_argument("--batch-size", type=int, default=32, help="prompts generated together")
    verb.add_argument("--output", metavar="OUT.json", help="write all figures here")
    return parser.parse_args(args)


def run_report(options: argparse.Namespace) -> None:
    """Loads target and drafters, measures, prints the table, writes the figures."""
    first = load_drafter(options.ckpt[0])
    path = options.target or first.target_path
    if path is None:
        raise UserError(f"{options.ckpt[0]} does not say what its target is; pass --target.")
    device = options.device or default_device()
    target = Target.load(
        path,
        gguf_file=options.gguf_file or (None if options.target else first.target_gguf_file),
        dtype=options.dtype or first.target_dtype,
        device=device,
    )
    drafters = [first, *(load_drafter(ckpt) for ckpt in options.ckpt[1:])]
    prompts = load_prompts(
        options.prompts,
        target.tokenizer,
        vocab_size=target.vocab_size,
        skip=options.skip,
        limit=options.limit,
    )
    settings = TrajectorySettings(
        options.max_new_tokens,
        Sampling(options.temperature, options.top_k, options.top_p),
        options.seed,
    )
    out = report(
        drafters,
        target,
        prompts,
        settings,
        mode=options.mode,
        folder=cache_root() / "trajectories",
        batch_size=options.batch_size,
    )
    out["command"] = sys.argv
    print(table(out))
    if options.output:
        write_atomic(Path(options.output), json.dumps(without_nan(out), indent=2) + "\n")
        print(f"figures: {options.output}")


def default_device() -> str:
    """Returns "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(args: list[str] | None = None) -> None:
    """Runs a verb; prints a user's mistake as one sentence and exits with code 2."""
    options = parse(args)
    with one_sentence_errors():
        run_report(options)


if __name__ == "__main__":
    main()
