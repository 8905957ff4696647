"""Trains one recipe after another and keeps every accepted length that it measured, held out.

python -m benchmarks.tuning run configs/tuning/screening.yaml --output tuning.jsonl --budget 560 \\
    -- --data.train_data aligned.jsonl.gz
python -m benchmarks.tuning show tuning.jsonl --plot accepted_length.png --rows-plot rows.png

Recipes are the rows of grids (`drafter.evaluation.recipes`). All run in one process, with one
target and one set of features. A finished recipe is a line of the output at once, and is not run
again; with a budget, none is begun that would probably not end in time. With several GPUs, start
one process on each (CUDA_VISIBLE_DEVICES) with its own --share and --output; `show` reads all.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.curves import scalars
from benchmarks.lines import read_lines, write_lines
from data.sharing import shared_between_runs
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.markdown import markdown_rows
from drafter.evaluation.plots import pyplot
from drafter.evaluation.recipes import Row, read_grid
from evaluate import train_row, where_and_when

LENGTH = "val/accepted_length"
CROSS_ENTROPY = "val/cross_entropy"  # after every epoch


def run(options: argparse.Namespace) -> list[str]:
    """Trains what is not there yet; returns the recipes that failed."""
    output, work = Path(options.output), Path(options.work)
    record = where_and_when(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    grids = [read_grid(path) for path in options.grids]
    number, shares = read_share(options.share)
    recipes = [(grid.name, row) for grid in grids for row in grid.rows][number - 1 :: shares]
    begun = time.perf_counter()
    paces: list[float] = []
    failed: list[str] = []
    with shared_between_runs():
        for grid, row in recipes:
            title, family = f"{grid}: {row.name}", row.family(options.overrides)
            if any(
                (one["family"], one["seed"]) == (family, options.seed) for one in read_lines(output)
            ):
                continue
            work_units = size(row, options.overrides)
            left = options.budget - (time.perf_counter() - begun)
            # the first one also loads the target and makes the features
            if left <= 0 or (paces and 1.3 * min(paces) * work_units > left):
                print(f"[{title}] not begun: {left:.0f} s are left", flush=True)
                continue
            line = {"grid": grid, "row": row.name, "seed": options.seed, "family": family}
            try:
                line |= train(row, options, work / f"{family}-seed{options.seed}")
            except SystemExit as stop:  # a setting that does not go, or no memory for it
                if stop.code != 2:
                    raise
                failed.append(title)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if not line["resumed"]:
                paces.append(line["seconds"] / work_units)
            lines = [*read_lines(output), {**line, **record}]
            write_lines(output, lines)
            print(json.dumps(line), flush=True)
    return failed


def read_share(text: str) -> tuple[int, int]:
    """Returns (which, of how many) from text such as 2/4.

    Raises:
        UserError: It is not two whole numbers, the first from 1 to the second.
    """
    which, _, shares = text.partition("/")
    if not (which.isdecimal() and shares.isdecimal() and 1 <= int(which) <= int(shares)):
        raise UserError(f"--share is {text!r}; give which of how many, such as 2/4.")
    return int(which), int(shares)


def size(row: Row, overrides: Sequence[str]) -> float:
    """Returns what a recipe's time is taken to be proportional to."""
    settings = row.settings(overrides)
    rows = settings.get("data.limit_rows") or 14_000
    steps = settings.get("trainer.max_steps") or -1
    epochs = max(1, settings.get("trainer.max_epochs") or 1)
    seen = rows * epochs if steps < 1 else steps * settings.get("data.batch_size", 16)
    return float(seen * settings.get("data.num_anchors", 48))


def train(row: Row, options: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Returns a recipe's flags and what its training gave."""
    resumed = (run_dir / "checkpoints" / "last.ckpt").exists()
    if run_dir.exists() and not resumed:
        shutil.rmtree(run_dir)  # stopped before it had anything to go on from but its curves
    begun = time.perf_counter()
    cli = train_row(row.arguments(options.seed, options.overrides), run_dir)
    seconds = time.perf_counter() - begun
    cli.datamodule.setup("fit")  # reads what it let go of at the end, if it did
    curves = scalars(run_dir)
    epoch_at, lengths = dict(curves.get("epoch", [])), curves.get(LENGTH, [])
    return {
        "flags": dict(row.flags),
        "configs": list(row.configs),
        "overrides": options.overrides,
        "rows": len(cli.datamodule.train_rows),
        "epochs": [int(epoch_at.get(step, 0)) + 1 if step else 0 for step, _ in lengths],
        "lengths": [length for _, length in lengths],
        "loss": [loss for _, loss in curves.get("train/cross_entropy", [])[-1:]],
        "val_cross_entropy": [loss for _, loss in curves.get(CROSS_ENTROPY, [])],
        "seconds": seconds,  # of the last piece
        "resumed": resumed,
    }


def best(line: dict[str, Any]) -> float:
    """Returns a recipe's longest accepted length; nan if none was measured."""
    return max(line["lengths"], default=math.nan)


def show(options: argparse.Namespace) -> list[str]:
    """Prints a table of what is there, the longest first; plots accepted length."""
    lines = [line for path in options.results for line in read_lines(Path(path))]
    lines = [line for line in lines if not options.grid or line["grid"] in options.grid]
    if not lines:
        raise UserError(f"{', '.join(options.results)}: no recipe is there.")
    epochs = sorted({epoch for line in lines for epoch in line["epochs"]})
    head = ["recipe", "seed", "best", *[f"epoch {epoch}" for epoch in epochs], "seconds"]
    body = []
    for line in sorted(lines, key=lambda line: -max([0.0, *line["lengths"]])):
        found = dict(zip(line["epochs"], line["lengths"], strict=True))
        cells = [f"{found[epoch]:.3f}" if epoch in found else "" for epoch in epochs]
        body.append(
            [line["row"], str(line["seed"]), f"{best(line):.3f}", *cells, f"{line['seconds']:.0f}"]
        )
    print("\n".join(markdown_rows(head, body)))
    if options.plot:
        plot(lines, Path(options.plot), options.title)
    if options.rows_plot:
        plot_rows(lines, Path(options.rows_plot), options.title)
    return []


def plot(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws accepted length, and cross-entropy if it is there, against epochs: a line a recipe."""
    lines = [line for line in lines if line["lengths"]]
    both = any(line.get("val_cross_entropy") for line in lines)
    plt = pyplot()
    fig, axes = plt.subplots(
        1, 1 + both, figsize=(7.5 + 3.5 * both, 4.5), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("viridis", max(3, len(lines) + 1))  # its last is too pale on white
    for place, line in enumerate(sorted(lines, key=lambda line: -line["lengths"][-1])):
        label = f"{line['row']}: {line['lengths'][-1]:.2f}"
        own = {"color": colours(place), "marker": ".", "label": label}
        axes[0, 0].plot(line["epochs"], line["lengths"], **own)
        losses = line.get("val_cross_entropy", [])
        if losses:
            axes[0, 1].plot(range(1, len(losses) + 1), losses, **own)
    for ax, what in zip(axes[0], ("accepted length", "cross-entropy"), strict=False):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("epochs")
        ax.set_ylabel(f"{what}, held-out prompts")
        ax.grid(alpha=0.3)
    fig.suptitle(title)
    if lines:
        axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_rows(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws accepted length at a recipe's end against the rows of its training: a line a grid."""
    known = [line for line in lines if line["lengths"] and line.get("rows")]
    if not known:
        raise UserError("no recipe here says how many rows it was trained on: nothing to plot.")
    known.sort(key=lambda line: line["rows"])
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 5.0), layout="constrained")
    for grid in dict.fromkeys(line["grid"] for line in known):
        own = [line for line in known if line["grid"] == grid]
        points = [(line["rows"], line["lengths"][-1]) for line in own]
        ax.plot(*zip(*points, strict=True), marker="o", label=grid)
        for line, point in zip(own, points, strict=True):
            note = f"{point[1]:.2f}\n{line['epochs'][-1]} epochs"
            how = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
            ax.annotate(note, point, (0, -8), **how)
    ax.legend()
    rows = sorted({line["rows"] for line in known})
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows, [f"{x:,}" for x in rows])
    ax.minorticks_off()
    ax.margins(0.12, 0.15)
    ax.set_xlabel("rows of training")
    ax.set_ylabel("accepted length, held-out prompts")
    ax.grid(alpha=0.3)
    ax.set_title(title)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(args: list[str] | None = None) -> None:
    """Runs a verb."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="train what is not there yet")
    running.add_argument("grids", nargs="+", help="YAML files")
    running.add_argument("--output", required=True, help="a line for every finished recipe")
    running.add_argument("--work", default="runs/tuning", help="run folders")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    running.add_argument("--share", default="1/1", help="2/4: the second of four processes' rows")
    showing = verbs.add_parser("show", help="a table and a plot")
    showing.add_argument("results", nargs="+", help="outputs of `run`")
    showing.add_argument("--grid", action="append", default=[], help="only this grid's recipes")
    showing.add_argument("--plot", help="PNG to write")
    showing.add_argument("--rows-plot", help="PNG to write: accepted length against rows")
    showing.add_argument("--title", default="")
    words = sys.argv[1:] if args is None else args
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.overrides = words[cut + 1 :]
    with one_sentence_errors():
        failed = {"run": run, "show": show}[options.verb](options)
        if failed:
            raise UserError(f"failed, for reasons given above: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
