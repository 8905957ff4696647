"""How time and memory of a training step grow with tokens, anchors, block size, vocabulary, rows.

python -m benchmarks.growth --output growth.jsonl --plot growth.png      # Llama-3-8B's width
python -m benchmarks.growth --toy --plot growth.png                      # a CPU, time only

One setting is changed at a time. The exponent beside a line is the slope between its last two
points on doubled scales: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.competitors import Case, Ours, full_stack, make_case
from benchmarks.lines import read_lines, write_lines
from benchmarks.shapes import SHAPES, random_target
from benchmarks.train_step import CHECKED_BLOCKS, TARGET_LAYERS, check_ours, forget, measure
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.markdown import markdown_rows
from drafter.evaluation.plots import COLOURS, pyplot
from drafter.target import Target
from evaluate import where_and_when

AXES: dict[str, Sequence[int]] = {
    "tokens": (1024, 2048, 4096, 8192, 16384, 32768),
    "anchors": (64, 128, 256, 512, 1024, 2048),
    "block_size": (4, 8, 16, 32),
    "vocab_size": (32768, 65536, 131072, 262144),
    "rows": (1, 2, 4, 8),
}
BASE = {"tokens": 4096, "anchors": 256, "block_size": 16, "vocab_size": 131072, "rows": 1}
TOY_AXES: dict[str, Sequence[int]] = {
    "tokens": (256, 512, 1024),
    "anchors": (8, 16, 32),
    "block_size": (4, 8, 16),
    "vocab_size": (1024, 4096, 16384),
    "rows": (1, 2, 4),
}
TOY_BASE = {"tokens": 256, "anchors": 8, "block_size": 8, "vocab_size": 1024, "rows": 1}
LABELS = {
    "tokens": "tokens a row (S)",
    "anchors": "anchors a row (A)",
    "block_size": "block size (K)",
    "vocab_size": "vocabulary (V)",
    "rows": "rows (B)",
}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each axis; returns the rows, which are in the output too."""
    device = torch.device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    axes, base = (TOY_AXES, TOY_BASE) if options.toy else (AXES, BASE)
    output = Path(options.output) if options.output else None
    rows = read_lines(output)
    record = where_and_when(device)
    target, made_for = None, 0
    for axis in options.axes or axes:
        for value in axes[axis]:
            sizes = base | {axis: value}
            line = {"axis": axis, **sizes, "layers": options.layers}
            if any(line.items() <= row.items() for row in rows):
                continue
            if target is None or made_for != sizes["vocab_size"]:
                target, made_for = None, sizes["vocab_size"]
                forget()
                shapes = SHAPES["toy" if options.toy else "llama3-8b"]
                fields = {**shapes, "vocab_size": made_for, "num_hidden_layers": TARGET_LAYERS}
                longest = max(*axes["tokens"], base["tokens"]) + 64
                target = random_target(fields, longest, device, dtype)
                # whole logits of many blocks would not fit
                few = base | {"anchors": min(CHECKED_BLOCKS, base["anchors"])}
                _check(target, few, options)
            case = _case(target, sizes, options)
            try:
                line |= measure(
                    case,
                    lambda case: Ours(case, full_stack(), compiled=options.compile),
                    warmup=2,
                    steps=options.steps,
                )
            except torch.OutOfMemoryError:
                line |= {"failed": "out of memory"}
            del case
            forget()
            rows.append(line | record)
            print(json.dumps(rows[-1]), flush=True)
            write_lines(output, rows)
    return rows


def _case(target: Target, sizes: dict[str, int], options: argparse.Namespace) -> Case:
    shape = {name: sizes[name] for name in ("tokens", "anchors", "block_size", "rows")}
    return make_case(target, layers=options.layers, taps=5, **shape)


def _check(target: Target, sizes: dict[str, int], options: argparse.Namespace) -> None:
    case = _case(target, sizes, options)
    found = check_ours(case, Ours(case, full_stack(), compiled=options.compile))
    print(f"V {target.vocab_size:,}: ours against its eager twin {found}", flush=True)
    forget()


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the last two points on logarithmic scales; nan for fewer.

    Example:
        >>> exponent([(1, 5), (2, 10), (4, 20)])
        1.0
    """
    if len(points) < 2 or min(points[-2][1], points[-1][1]) <= 0:
        return math.nan
    (x0, y0), (x1, y1) = points[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def series(rows: Sequence[dict[str, Any]], axis: str, figure: str) -> list[tuple[float, float]]:
    """Returns an axis' points (value, figure), in order."""
    found = [row for row in rows if row["axis"] == axis and row.get(figure) is not None]
    return sorted((float(row[axis]), float(row[figure])) for row in found)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a markdown table."""
    head = ("changed", "to", "ms", "exponent", "GiB over weights", "exponent")
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        lost = [str(row[axis]) for row in rows if row["axis"] == axis and "failed" in row]
        times, memory = series(rows, axis, "step_ms"), series(rows, axis, "gib_over_weights")
        peaks = dict(memory)
        for place, (value, time) in enumerate(times):
            last = place + 1 == len(times)
            lines.append(
                (
                    LABELS[axis],
                    f"{value:,.0f}",
                    f"{time:.1f}",
                    f"{exponent(times):.2f}" if last else "",
                    f"{peaks[value]:.2f}" if value in peaks else "",
                    f"{exponent(memory):.2f}" if last and memory else "",
                )
            )
        if lost:
            lines.append((LABELS[axis], ", ".join(lost), "out of memory", "", "", ""))
    return "\n".join(markdown_rows(head, lines))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws time, and memory where it is known, against each axis, on doubled scales."""
    plt = pyplot()
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figures = {"step_ms": "ms a step", "gib_over_weights": "GiB over weights"}
    shown = [name for name in figures if any(series(rows, axis, name) for axis in axes)]
    fig, places = plt.subplots(
        len(shown),
        len(axes),
        figsize=(2.7 * len(axes), 2.6 * len(shown)),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for line, figure in enumerate(shown):
        for column, axis in enumerate(axes):
            ax, points = places[line][column], series(rows, axis, figure)
            ax.plot(*zip(*points, strict=True), marker="o", color=COLOURS[line])
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks([x for x, _ in points], [_short(x) for x, _ in points], fontsize=7)
            ax.minorticks_off()
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_title(f"exponent {exponent(points):.2f}", fontsize=9)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
            if line + 1 == len(shown):
                ax.set_xlabel(LABELS[axis])
            if column == 0:
                ax.set_ylabel(figures[figure])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=list(AXES), help="default: all")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the drafter: slow to begin")
    parser.add_argument("--output", help="JSON lines; what is there is not run again")
    parser.add_argument("--plot", help="PNG to write")
    parser.add_argument("--toy", action="store_true", help="small shapes, fp32, on the CPU")
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        if not options.toy and not torch.cuda.is_available():
            raise UserError("There is no GPU here; --toy runs a small version on the CPU.")
        rows = run(options)
        print(show(rows))
        if options.plot:
            plot(rows, Path(options.plot))


if __name__ == "__main__":
    main()
