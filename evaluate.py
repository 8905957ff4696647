"""Measures drafters: `python evaluate.py report --ckpt RUN --benchmarks gsm8k aime`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmarks import BENCHMARKS, benchmark_rows
from data.prompt_sets import FollowUps, Prompt, load_prompt_sets, load_prompts
from data.sharing import load_target as load_shared_target
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.loading import LoadedDrafter, load_drafter
from drafter.evaluation.measure import FeatureStore
from drafter.evaluation.report import ReportSettings, report, sort_by_fit, table
from drafter.evaluation.results import merge, read_result, summarise, without_nan
from drafter.evaluation.trajectories import Skipped, TrajectorySettings
from drafter.files import cache_root, write_atomic
from drafter.sampling import Sampling
from drafter.target import Target


def parse(args: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; `report` is the default verb."""
    args = sys.argv[1:] if args is None else args
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = ["report", *args]
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("report", help="measure one or more drafters side by side")
    verb.add_argument(
        "--ckpt",
        action="append",
        required=True,
        metavar="PATH",
        help="checkpoint (.ckpt), run folder, or drafter folder (z-lab layout); repeatable",
    )
    add_prompt_options(verb)
    add_measuring_options(verb)
    verb.add_argument("--block-size", type=int, help="K to decode with; default: as trained")
    verb.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    verb.add_argument("--output", metavar="OUT.json", help="write figures, tables, plots and page")

    verb = verbs.add_parser("merge", help="join result files of partial runs")
    verb.add_argument("results", nargs="+", metavar="IN.json")
    verb.add_argument("--output", required=True, metavar="OUT.json")

    verb = verbs.add_parser("ablation", help="train and measure a grid of recipes")
    verb.add_argument("--config", nargs="+", required=True, metavar="GRID.yaml")
    verb.add_argument("--seeds", type=int, default=1, help="runs of each recipe, seeds 0, 1, ...")
    add_prompt_options(verb)
    add_measuring_options(verb)
    verb.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    verb.add_argument("--output", required=True, metavar="DIR", help="rows, runs, table and page")
    verb.epilog = "After `--`: flags of train.py that go to every row."
    own, overrides = args, []
    if "--" in args:
        own, overrides = args[: args.index("--")], args[args.index("--") + 1 :]
    options = parser.parse_args(own)
    if overrides and options.verb != "ablation":
        parser.error("flags after `--` are for `ablation`")
    options.overrides = overrides
    return options


def add_prompt_options(verb: argparse.ArgumentParser) -> None:
    """Adds what is measured on."""
    verb.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}, from the hub, or from --benchmark-dir",
    )
    verb.add_argument("--benchmark-dir", metavar="DIR", help="folder of <name>.jsonl with `turns`")
    verb.add_argument(
        "--prompts", nargs="+", metavar="FILE", help="other prompt files, sets named by their stem"
    )
    verb.add_argument("--limit", type=int, help="prompts of each set")
    verb.add_argument("--skip", type=int, default=0, help="prompts of each set passed over first")
    verb.add_argument("--target", help="target; default: the one recorded in the checkpoint")
    verb.add_argument("--gguf-file", help="GGUF file inside the target's folder")
    verb.add_argument("--trust-remote-code", action="store_true", help="run the target's own code")
    verb.add_argument("--dtype", help="of target and drafter; default: the run's target's")
    verb.add_argument("--device", help="default: cuda where there is one, else cpu")


def add_measuring_options(verb: argparse.ArgumentParser) -> None:
    """Adds how it is measured."""
    verb.add_argument(
        "--mode",
        choices=("replay", "decode", "both"),
        default="replay",
        help="replay: rounds read off the target's responses; decode: the real loop, timed",
    )
    verb.add_argument(
        "--audit", action="store_true", help="decode with and without; explain what differs"
    )
    verb.add_argument("--max-new-tokens", type=int, default=2048)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    verb.add_argument("--top-k", type=int, default=0)
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0, help="of sampled responses")
    verb.add_argument("--batch-size", type=int, default=32, help="prompts generated together")
    verb.add_argument("--feature-budget-gb", type=float, default=4.0, help="kept between drafters")
    verb.add_argument("--cache-dir", help="default: ~/.cache/l2r-drafter")
    verb.add_argument("--fresh", action="store_true", help="measure again what is kept")
    verb.add_argument("--no-progress", action="store_true", help="show no bars")


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


def load_target(options: argparse.Namespace, drafter: LoadedDrafter) -> Target:
    """Returns the target that the options name, or else the drafter's own."""
    path = options.target or drafter.target_path
    if path is None:
        raise UserError(f"{drafter.name} does not say what its target is; pass --target.")
    return load_shared_target(
        path,
        gguf_file=options.gguf_file or (None if options.target else drafter.target_gguf_file),
        dtype=options.dtype or drafter.target_dtype,
        device=options.device or default_device(),
        revision=None,
        trust_remote_code=options.trust_remote_code,
    )


def default_device() -> str:
    """Returns "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_eval_prompts(
    options: argparse.Namespace, target: Target
) -> tuple[list[Prompt], list[Skipped]]:
    """Returns the first turns of all sets, and what can't be used of them.

    Raises:
        UserError: Nothing to measure on is named, or nothing of it is left.
    """
    skipped: list[Skipped] = []
    common: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "skip": options.skip,
        "limit": options.limit,
        "max_prompt_tokens": room_for_prompts(options, target),
        "skipped": skipped,
    }
    files = list(options.prompts or [])
    prompts: list[Prompt] = []
    names = options.benchmarks or []
    if options.benchmark_dir:
        folder = Path(options.benchmark_dir)
        files += [str(folder / f"{name}.jsonl") for name in names] if names else [str(folder)]
    elif names:
        rows = benchmark_rows(names)
        source = "benchmarks"
        prompts += load_prompt_sets(rows, target.tokenizer, source=source, **common)
    if files:
        prompts += load_prompts(files, target.tokenizer, **common)
    if not prompts:
        raise UserError("nothing to measure on: pass --benchmarks, --benchmark-dir or --prompts.")
    for (name, reason), count in Counter((s.set_name, s.reason) for s in skipped).items():
        print(f"left out: {name}: {count} x {reason}")
    return prompts, skipped


def room_for_prompts(options: argparse.Namespace, target: Target) -> int:
    """Returns the longest prompt, in tokens, that leaves room for a whole response."""
    room = target.max_length - options.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt in the "
            f"target's context of {target.max_length}; lower it."
        )
    return room


def run_report(options: argparse.Namespace) -> None:
    """Loads target and drafters, measures, prints the tables, writes what was asked for."""
    settings = settings_from(options)
    drafters = [load_drafter(path, options.block_size) for path in options.ckpt]
    target = load_target(options, drafters[0])
    sort_by_fit(drafters, target)  # before anything long
    prompts, skipped = load_eval_prompts(options, target)
    follow_up = FollowUps(target.tokenizer, room_for_prompts(options, target), skipped=skipped)
    if options.dry_run:
        from drafter.evaluation.plan import plan

        fitting, misfits = sort_by_fit(drafters, target)
        print("\n".join([*misfits, *plan(fitting, target, prompts, follow_up, settings)]))
        return
    result = report(drafters, target, prompts, follow_up, settings)
    result |= where_and_when(str(target.device))
    result["overlap"] = overlap(drafters, prompts, target)
    show(result)
    if options.output:
        write_result(result, Path(options.output))


def where_and_when(device: str) -> dict[str, Any]:
    """Returns the command, date, revision and device, for the record."""
    import torch

    from callbacks.run_files import git_commit

    name = torch.cuda.get_device_name(torch.device(device)) if "cuda" in device else "CPU"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_commit(),
        "torch": torch.__version__,
        "device_name": name,
    }


def overlap(
    drafters: Sequence[LoadedDrafter], prompts: Sequence[Prompt], target: Target
) -> dict[str, Any]:
    """Returns, by drafter, how many prompts were among its training rows, or why it isn't known."""
    import yaml

    from data.overlap import as_plain, find_overlap, training_texts

    found: dict[str, Any] = {}
    checked: dict[str, Any] = {}
    for loaded in drafters:
        if loaded.run_config is None:
            found[loaded.name] = "not checked: its training data is not recorded beside it"
            continue
        data = yaml.safe_load(loaded.run_config.read_text()).get("data", {})
        held_out = data.get("val_rows", 0) if data.get("val_data") is None else 0
        key = json.dumps([data.get("train_data"), held_out, data.get("limit_rows")])
        if key not in checked:
            try:
                texts = training_texts(
                    data["train_data"],
                    target.tokenizer,
                    skip=held_out,
                    limit=data.get("limit_rows"),
                    split=data.get("train_split", "train"),
                )
                checked[key] = as_plain(find_overlap(prompts, texts))
            except (UserError, KeyError) as error:
                checked[key] = f"not checked: {error}"
        found[loaded.name] = checked[key]
    for name, sets in found.items():
        if isinstance(sets, str):
            print(f"overlap with training data: {name}: {sets}")
            continue
        hit = [
            f"{s} {row['shared']} of {row['prompts']}" for s, row in sets.items() if row["shared"]
        ]
        told = ", ".join(hit) or "no prompt"
        print(f"overlap with training data: {name}: {told} shares a run of 13 words with it")
    return found


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    print()
    for reason in result["misfits"]:
        print(f"left out: {reason}")
    print(table(result))


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes the figures, and beside them tables, plots and the page."""
    from drafter.evaluation.page import html_page, markdown

    result = without_nan(result)
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    stem = path.with_suffix("")
    write_atomic(stem.with_name(f"{stem.name}.md"), markdown(result))
    try:
        from drafter.evaluation.plots import write_plots

        write_plots(result, stem)
        write_atomic(stem.with_name(f"{stem.name}.html"), html_page([result]))
    except ModuleNotFoundError as error:  # pragma: no cover - a bare machine
        print(
            f"no plots and no page: {error.name} is not installed; `evaluate.py merge` makes them"
        )
    print(f"figures: {path}; tables, plots and page: {stem}.md, {stem}-*.png, {stem}.html")


def run_merge(options: argparse.Namespace) -> None:
    """Joins result files, makes all figures anew, and writes the whole as `report` does."""
    result = summarise(merge([read_result(Path(path)) for path in options.results]))
    show(result)
    write_result(result, Path(options.output))


def run_ablation(options: argparse.Namespace) -> None:
    """Trains and measures grids of recipes in one process; see drafter/evaluation/ablation.py."""
    from data.sharing import shared_between_runs
    from drafter.evaluation.ablation import Ablation, read_grid

    settings = settings_from(options)
    grids = [read_grid(path) for path in options.config]
    features = FeatureStore(int(options.feature_budget_gb * 1e9))

    def measure(run_dir: Path, sizes: Sequence[int | None]) -> list[dict[str, Any]]:
        checkpoint = str(run_dir / "checkpoints" / "last.ckpt")  # the budget's end, not its best
        results = []
        for size in sizes:
            loaded = load_drafter(checkpoint, size)
            target = load_target(options, loaded)
            prompts, skipped = load_eval_prompts(options, target)
            room = room_for_prompts(options, target)
            follow_up = FollowUps(target.tokenizer, room, skipped=skipped)
            results.append(report([loaded], target, prompts, follow_up, settings, features))
        return results

    ablation = Ablation(
        Path(options.output),
        train=train_row,
        measure=measure,
        measured_as=measured_as(options),
        overrides=options.overrides,
        record=where_and_when(options.device or default_device()),
    )
    if options.dry_run:
        print("\n".join(ablation.pending(grids, options.seeds)))
        return
    with shared_between_runs():
        ablation.run(grids, options.seeds)
    write_ablation(ablation.results(grids, options.seeds), Path(options.output))


def write_ablation(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Prints the grids' tables, and writes them with figures and page."""
    from drafter.evaluation.page import html_page, markdown

    results = [without_nan(result) for result in results]
    write_atomic(folder / "ablation.json", json.dumps(results, indent=1) + "\n")
    text = "\n".join(f"## {result['grid']}\n\n{markdown(result)}" for result in results)
    write_atomic(folder / "ablation.md", text)
    print(text)
    try:
        write_atomic(folder / "ablation.html", html_page(results, "Ablation"))
    except ModuleNotFoundError as error:
        print(f"no page: {error.name} is not installed; the same command makes it where it is")
    print(f"rows: {folder}/rows; tables: {folder}/ablation.md; page: {folder}/ablation.html")


def train_row(arguments: list[str], run_dir: Path) -> None:
    """Trains one run of a recipe in this process, going on from its last checkpoint if any."""
    import train

    arguments = ["fit", *arguments, "--run_dir", str(run_dir)]
    if (run_dir / "config.yaml").exists():
        arguments += ["--ckpt_path", "last"]
    os.environ.pop(train.RUN_DIR_VARIABLE, None)
    own, sys.argv = sys.argv, ["train.py", *arguments]  # what the run's provenance should say
    try:
        train.main()
    finally:
        sys.argv = own


def measured_as(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that a row's figures depend on, as plain values."""
    names = ("benchmarks", "benchmark_dir", "prompts", "limit", "skip", "target", "gguf_file")
    names += ("dtype", "mode", "audit", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(options, name) for name in names}


def main(args: list[str] | None = None) -> None:
    """Runs a verb; prints a user's mistake as one sentence and exits with code 2."""
    import torch

    options = parse(args)
    with one_sentence_errors():
        try:
            {"report": run_report, "merge": run_merge, "ablation": run_ablation}[options.verb](
                options
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on the device; lower --batch-size ({options.batch_size}) or "
                f"--feature-budget-gb ({options.feature_budget_gb:g}). What was finished is kept."
            ) from error


if __name__ == "__main__":
    main()
