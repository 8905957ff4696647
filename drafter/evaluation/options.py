"""The command line of evaluate.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from drafter.errors import UserError
from drafter.evaluation.contenders import add_search_options
from drafter.evaluation.report import ReportSettings
from drafter.evaluation.trajectories import TrajectorySettings
from drafter.files import cache_root, file_stamp
from drafter.sampling import Sampling

DESCRIPTION = "Measures drafters: accepted length and speed, with intervals, plots and a page."


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; `report` is the default verb."""
    args = list(args)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = ["report", *args]
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("report", help="measure one or more drafters side by side")
    verb.add_argument(
        "--ckpt",
        action="append",
        required=True,
        metavar="PATH",
        help="checkpoint (.ckpt), run folder, or drafter folder (z-lab layout); repeatable",
    )
    _add_prompt_options(verb)
    _add_measuring_options(verb)
    verb.add_argument("--block-size", type=int, help="K to decode with; default: as trained")
    add_search_options(verb)
    verb.add_argument(
        "--draft-length",
        metavar="FILE.json",
        help="what `calibrate` wrote: measure the drafter with its drafts cut so, too",
    )
    verb.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    verb.add_argument("--output", metavar="OUT.json", help="write figures, tables, plots and page")

    verb = verbs.add_parser(
        "calibrate", help="find how many slots of a draft are worth verifying on this device"
    )
    verb.add_argument("--ckpt", required=True, metavar="PATH", help="as in `report`")
    _add_prompt_options(verb)
    _add_measuring_options(verb, modes=False)
    verb.add_argument("--block-size", type=int, help="K to decode with; default: as trained")
    verb.add_argument("--output", required=True, metavar="OUT.json", help="the rule, for `report`")

    verb = verbs.add_parser("doctor", help="find why the accepted length is stuck near 1")
    verb.add_argument("--ckpt", required=True, metavar="PATH", help="as in `report`")
    verb.add_argument(
        "--data", nargs="+", metavar="FILE", help="training rows; default: those of the run"
    )
    verb.add_argument("--cache", metavar="DIR", help="feature cache; default: that of the run")
    verb.add_argument("--rows", type=_at_least(1), default=8, help="rows that are looked at")
    verb.add_argument("--max-length", type=int, default=1024, help="longer rows are cut to it")
    _add_target_options(verb, "the run's target's, on a CPU float32")
    verb.add_argument("--block-size", type=int, help="K to decode with; default: as trained")
    verb.add_argument("--output", metavar="OUT.json", help="write the findings")

    verb = verbs.add_parser("merge", help="join result files of partial runs")
    verb.add_argument("results", nargs="+", metavar="IN.json")
    verb.add_argument("--output", required=True, metavar="OUT.json")

    verb = verbs.add_parser("ablation", help="train and measure a grid of recipes")
    verb.add_argument("--config", nargs="+", required=True, metavar="GRID.yaml")
    verb.add_argument(
        "--seeds", type=_at_least(1), default=1, help="runs of each recipe, seeds 0, 1, ..."
    )
    _add_prompt_options(verb)
    _add_measuring_options(verb)
    verb.add_argument(
        "--dry-run", action="store_true", help="print what is done and to do, and stop"
    )
    verb.add_argument(
        "--budget", type=float, default=math.inf, help="seconds: begin no row that would not end"
    )
    verb.add_argument("--output", required=True, metavar="DIR", help="rows, runs, table and page")
    verb.add_argument(
        "--tables", metavar="DIR", help="also write each grid's own page there, with its plots"
    )
    verb.epilog = "After `--`: flags of train.py that go to every row."
    own, overrides = args, []
    if "--" in args:
        own, overrides = args[: args.index("--")], args[args.index("--") + 1 :]
    options = parser.parse_args(own)
    if overrides and options.verb != "ablation":
        parser.error("flags after `--` are for `ablation`")
    options.overrides = overrides
    if str(getattr(options, "output", None)).endswith((".md", ".html", ".png")):
        parser.error("--output names the JSON file; table, plots and page are laid beside it")
    return options


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} up")
        return int(text)

    return whole


def _add_prompt_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help="of gsm8k, aime, humaneval, mbpp, livecodebench, mt-bench: from the hub, or from "
        "--benchmark-dir",
    )
    verb.add_argument("--benchmark-dir", metavar="DIR", help="folder of <name>.jsonl with `turns`")
    verb.add_argument(
        "--prompts", nargs="+", metavar="FILE", help="other prompt files, sets named by their stem"
    )
    verb.add_argument("--limit", type=_at_least(1), help="prompts of each set")
    verb.add_argument(
        "--skip", type=_at_least(0), default=0, help="prompts of each set passed over first"
    )
    _add_target_options(verb)


def _add_target_options(verb: argparse.ArgumentParser, dtype: str = "the run's target's") -> None:
    verb.add_argument("--target", help="target; default: the one recorded in the checkpoint")
    verb.add_argument("--gguf-file", help="GGUF file inside the target's folder")
    verb.add_argument("--trust-remote-code", action="store_true", help="run the target's own code")
    verb.add_argument("--dtype", help=f"of target and drafter; default: {dtype}")
    verb.add_argument("--device", help="default: cuda where there is one, else cpu")


def _add_measuring_options(verb: argparse.ArgumentParser, modes: bool = True) -> None:
    verb.set_defaults(mode="replay", audit=False)
    if modes:
        _add_mode_options(verb)
    verb.add_argument("--max-new-tokens", type=_at_least(1), default=2048)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    verb.add_argument("--top-k", type=int, default=0)
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=_at_least(0), default=0, help="of sampled responses")
    verb.add_argument(
        "--batch-size", type=_at_least(1), default=32, help="prompts generated together"
    )
    verb.add_argument("--feature-budget-gb", type=float, default=4.0, help="kept between drafters")
    verb.add_argument("--cache-dir", help="default: ~/.cache/l2r-drafter")
    verb.add_argument("--fresh", action="store_true", help="measure again what is kept")
    verb.add_argument("--no-progress", action="store_true", help="show no bars")


def _add_mode_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--mode",
        choices=("replay", "decode", "both"),
        default="replay",
        help="replay: rounds read off the target's responses; decode: the real loop, timed",
    )
    verb.add_argument(
        "--audit", action="store_true", help="decode with and without; explain what differs"
    )


def settings_from(options: argparse.Namespace) -> ReportSettings:
    """Returns the options as settings."""
    return ReportSettings(
        TrajectorySettings(
            options.max_new_tokens,
            Sampling(options.temperature, options.top_k, options.top_p),
            options.seed,
        ),
        mode=options.mode,
        audit=options.audit,
        batch_size=options.batch_size,
        folder=cache_root(options.cache_dir),
        fresh=options.fresh,
        feature_budget_gb=options.feature_budget_gb,
        progress=not options.no_progress,
    )


def measured_as(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what figures depend on beside the drafter, as plain values: options and files.

    A folder of benchmarks is known by what it holds, wherever it lies.
    """
    files = [*(options.prompts or ()), *filter(None, (options.target,))]
    held = [file_stamp(path) for path in files]
    if options.benchmark_dir:
        held += [file_stamp(str(path)) for path in sorted(Path(options.benchmark_dir).glob("*"))]
    names = "benchmarks prompts limit skip target gguf_file dtype device mode audit"
    names += " max_new_tokens temperature top_k top_p seed"
    return {**{name: getattr(options, name) for name in names.split()}, "files": held}


def check_device(name: str) -> str:
    """Returns a device's name; raises UserError unless torch can use it here."""
    try:
        kind = torch.device(name).type
        usable = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"--device {name}: torch can't use it here; choose cpu, or cuda on a GPU.")
    return name
