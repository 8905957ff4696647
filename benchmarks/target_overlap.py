"""What running the target beside the drafter's step could save in online training, at most.

python -m benchmarks.target_overlap --output target_overlap.jsonl          # a GPU of 80 GB
python -m benchmarks.target_overlap --toy                                  # a CPU

Times one micro-batch's target pass, the drafter's step, one after the other, and both at once on
two streams of one GPU, in the better of the two orders in which the host can launch them. No step
depends on the pass beside it here, as if all features came one micro-batch early: an online run
that overlaps a step that is not compiled can't gain more than this.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.competitors import Ours, full_stack, make_case
from benchmarks.lines import read_lines, write_lines
from benchmarks.shapes import SHAPES, random_target
from benchmarks.train_step import check_ours, forget, launch_bound, mark, milliseconds
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.markdown import markdown_rows
from drafter.layer_ids import default_layer_ids
from evaluate import where_and_when

FULL = {"tokens": 2048, "rows": 4, "anchors": 48, "layers": 4, "taps": 5}
"""A micro-batch of `configs/targets`: tokens a row, rows, anchors a row, drafter layers, taps."""
WARMUP = 3  # kernels are chosen, and a step recorded, in the first turns
TOY = {"tokens": 128, "rows": 2, "anchors": 8, "layers": 2, "taps": 3}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each target; returns the rows, which are in the output too."""
    device = torch.device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    sizes = TOY if options.toy else FULL
    output = Path(options.output) if options.output else None
    rows, record = read_lines(output), where_and_when(device)
    for shapes in options.shapes:
        line = {"shapes": shapes, **sizes}
        if any(line.items() <= row.items() for row in rows):
            continue
        rows.append(line | measure(shapes, sizes, device, dtype, options.steps) | record)
        print(json.dumps(rows[-1]), flush=True)
        write_lines(output, rows)
        forget()
    return rows


def measure(
    shapes: str, sizes: dict[str, int], device: torch.device, dtype: torch.dtype, steps: int
) -> dict[str, float]:
    """Returns the milliseconds `target_ms`, `step_ms`, `in_turn_ms` and `at_once_ms`.

    Args:
        shapes: A target of `SHAPES`, with all of its layers.
        sizes: See `FULL`.
        device: Where; on a CPU there are no streams, and both at once are both in turn.
        dtype: Of the target.
        steps: How often each is timed; medians are given.
    """
    on_gpu = device.type == "cuda"
    target = random_target(SHAPES[shapes], sizes["tokens"] + 64, device, dtype)
    case = make_case(target, block_size=16, **sizes)
    make = partial(Ours, case, full_stack(), graphs=launch_bound(case))
    print(f"{shapes}: ours against its eager twin {check_ours(case, make())}", flush=True)
    forget()
    drafter = make()
    layer_ids = default_layer_ids(target.num_layers, sizes["taps"])
    batch = case.batch
    side = torch.cuda.Stream() if on_gpu else None

    def target_pass() -> None:
        target.features(batch.input_ids, batch.document_ids, layer_ids, packed=False)

    def step() -> None:
        drafter.backward(drafter.forward())
        drafter.update()

    def in_turn() -> None:
        target_pass()
        step()

    def at_once(*, pass_first: bool) -> None:
        if side is None:
            return in_turn()
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        if not pass_first:
            step()
        with torch.cuda.stream(side):
            target_pass()
        if pass_first:
            step()
        main.wait_stream(side)

    ways: dict[str, Callable[[], None]] = {
        "target": target_pass,
        "step": step,
        "in_turn": in_turn,
        "pass_first": partial(at_once, pass_first=True),
        "step_first": partial(at_once, pass_first=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARMUP + steps):
        for name, way in ways.items():
            begun = mark(on_gpu)
            way()
            taken = milliseconds(begun, mark(on_gpu))
            if turn >= WARMUP:
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    medians["at_once"] = min(medians.pop("pass_first"), medians.pop("step_first"))
    return {f"{name}_ms": taken for name, taken in medians.items()}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a markdown table."""
    head = ("target", "pass, ms", "drafter's step", "in turn", "of it the pass", "at once", "saved")
    return "\n".join(
        markdown_rows(
            head,
            [
                (
                    row["shapes"],
                    *(f"{row[f'{name}_ms']:.1f}" for name in ("target", "step", "in_turn")),
                    f"{row['target_ms'] / row['in_turn_ms']:.0%}",
                    f"{row['at_once_ms']:.1f}",
                    f"{1 - row['at_once_ms'] / row['in_turn_ms']:.1%}",
                )
                for row in rows
            ],
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="JSON lines; what is there is not run again")
    parser.add_argument("--toy", action="store_true", help="small shapes, fp32, on the CPU")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (["toy"] if options.toy else ["llama3-8b", "smollm2"])
    with one_sentence_errors():
        if not options.toy and not torch.cuda.is_available():
            raise UserError("There is no GPU here; --toy runs a small version on the CPU.")
        print(show(run(options)))


if __name__ == "__main__":
    main()
