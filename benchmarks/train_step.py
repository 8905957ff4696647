"""Times one training step of ours and of other packages' DFlash drafters, on the same inputs.

python -m benchmarks.train_step --peers .peers --output train_step.jsonl          # a GPU
python -m benchmarks.train_step --toy                                             # a CPU

Peers are imported from `--peers`, a folder made by

pip install --no-deps --target .peers specforge==0.2.0 speculators==0.9.0 openai loguru \\
    pydantic-settings hs-connectors==0.9.0 python-dotenv jiter distro sniffio anyio httpx \\
    httpcore h11 idna certifi typing-inspection httpx2 httpcore2 truststore

Before anything is timed, our loss and gradients are held to an eager twin that forms all logits,
and `specforge`'s to ours from the same weights and anchors. A line of the output is one drafter on
one case; what is there is not run again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import (
    Case,
    Competitor,
    Ours,
    SpecForge,
    Speculators,
    full_stack,
    make_case,
    plain,
    step_arithmetic,
)
from benchmarks.lines import read_lines, write_lines
from benchmarks.shapes import SHAPES, random_target
from drafter.attention import build_visibility
from drafter.blocks import build_blocks
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.markdown import markdown_rows
from evaluate import where_and_when
from losses import BlockScores, CombinedLoss

LAUNCH_BOUND = 1024
"""Hidden sizes up to this take longer to launch than to run: `model.cuda_graphs` is for them."""
CHECKED_BLOCKS = 64
TARGET_LAYERS = 8  # of the random target: enough for the taps, and little memory
DRAFTERS: dict[str, Callable[[Case], Competitor]] = {
    "ours": lambda case: _ours(case, full_stack(), "ours"),
    "ours, cross-entropy only": lambda case: _ours(case, plain(), "ours, cross-entropy only"),
    "ours, eager": lambda case: Ours(case, full_stack(), name="ours, eager"),
    "specforge": SpecForge,
    "speculators": Speculators,
    "speculators, not compiled": lambda case: Speculators(case, compiled=False),
    "speculators, eager loss": lambda case: Speculators(case, "eager"),
}
TOY = ("ours", "ours, cross-entropy only", "specforge", "speculators, eager loss")
"""What runs without a GPU: the others' kernels need one."""


def _ours(case: Case, loss: CombinedLoss, name: str) -> Ours:
    on_gpu = case.device.type == "cuda"
    return Ours(case, loss, compiled=on_gpu, graphs=launch_bound(case), name=name)


def launch_bound(case: Case) -> bool:
    """Returns whether a step, kernel by kernel, takes as long as the host needs to launch it."""
    return case.device.type == "cuda" and case.target.hidden_size <= LAUNCH_BOUND


# ---------------------------------------------------------------------- correctness


def check_ours(case: Case, ours: Ours | None = None) -> dict[str, float]:
    """Holds our loss and gradients to an eager twin that forms all logits.

    Args:
        case: Inputs.
        ours: As it will be timed, on this case with the full loss; default: `train_step`'s own.

    Returns:
        `loss` and `gradient`, the relative differences.

    Raises:
        AssertionError: They are more than the dtype explains.
    """
    ours = ours or _ours(case, full_stack(), "ours")
    for _ in range(3):  # recorded graphs begin with the second step of a shape
        ours.module.zero_grad()
        loss = None  # the last step's graph can't be alive while the next is recorded
        loss = ours.forward()
        ours.backward(loss)
    assert loss is not None
    gradients = [p.grad.clone() for p in ours.trained if p.grad is not None]
    ours.module.zero_grad()
    twin = full_stack()(_naive_scores(ours), 0.5).total
    twin.backward()  # type: ignore[no-untyped-call]
    expected = [p.grad for p in ours.trained if p.grad is not None]
    return _differences(loss, twin, gradients, expected, case)


def _naive_scores(ours: Ours) -> BlockScores:
    """Returns scores from whole logits, by an uncompiled forward with a dense mask."""
    case, drafter = ours.case, ours.module.drafter
    assert drafter is not None
    blocks = build_blocks(case.batch, case.block_size, 0)
    visibility = build_visibility(
        case.batch.anchors,
        case.batch.document_ids,
        case.block_size,
        "sdpa",
        drafter.config.head_dim,
    )
    with case.autocast():
        hidden = drafter.forward(  # not by calling it: that is what compile() replaces
            case.features,
            case.batch.positions,
            case.target.embed(blocks.input_ids),
            blocks.positions,
            visibility,
        )
    head = case.target.head.weight
    logits = (hidden[:, :, 1:].to(head.dtype) @ head.t()).float()
    log_probs = logits.log_softmax(-1).gather(-1, blocks.labels.unsqueeze(-1)).squeeze(-1)
    correct = (logits.argmax(-1) == blocks.labels) & blocks.valid
    scores = (torch.where(blocks.valid, log_probs, 0.0), correct, blocks.valid)
    return BlockScores(*(tensor.flatten(0, 1) for tensor in scores))


def check_specforge(case: Case, attention: str) -> dict[str, float]:
    """Holds `specforge`'s loss and gradients to ours, from the same weights at the same anchors.

    Its RoPE frequencies are given back their fp32: it trains with them in bf16, since it casts the
    whole drafter, which turns angles at position 2,000 by up to 2.4 radians.

    Args:
        case: Inputs.
        attention: Which of its own.

    Returns and raises as `check_ours`. It shows that both are timed at the same arithmetic.
    """
    ours, theirs = Ours(case, plain()), SpecForge(case, attention)
    rope = theirs.drafter.rotary_emb
    theirs.drafter.rotary_emb = type(rope)(theirs.drafter.config).to(case.device)
    assert ours.module.drafter is not None
    theirs.drafter.load_state_dict(ours.module.drafter.state_dict())
    anchors = case.batch.anchors
    theirs.model._sample_anchor_positions = lambda *_: (anchors, torch.ones_like(anchors).bool())
    for competitor in (ours, theirs):
        loss = competitor.forward()
        competitor.backward(loss)
    loss = ours.forward()
    named = dict(theirs.drafter.named_parameters())
    pairs = [(p.grad, named[n].grad) for n, p in ours.module.drafter.named_parameters()]
    return _differences(
        theirs.forward(), loss, [b.float() for _, b in pairs], [a for a, _ in pairs], case
    )


def _differences(
    loss: Tensor, expected: Tensor, gradients: Sequence[Any], wanted: Sequence[Any], case: Case
) -> dict[str, float]:
    flat, wanted_flat = (torch.cat([g.flatten() for g in many]) for many in (gradients, wanted))
    found = {
        "loss": float((loss - expected).detach().abs() / expected.detach().abs()),
        "gradient": float((flat - wanted_flat).norm() / wanted_flat.norm()),
    }
    bound = 0.1 if case.device.type == "cuda" else 1e-4  # bf16 gradients: a few percent apart
    assert max(found.values()) < bound, f"differs from what it should be: {found}"
    return found


# ---------------------------------------------------------------------- measuring


def measure(case: Case, make: Callable[[Case], Competitor], warmup: int, steps: int) -> Any:
    """Returns what one drafter's step takes.

    Args:
        case: Inputs.
        make: Builds the drafter.
        warmup: Steps before the clock starts, at least 2; compilers work in the first, and steps
            are recorded in the second.
        steps: Steps that are timed; medians are given.
    """
    on_gpu = case.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    competitor = make(case)
    for step in range(warmup):
        competitor.backward(competitor.forward())
        competitor.update()
        if on_gpu and step == 0:
            # a recorded step holds its memory from the second step on, and asks for none again
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
    if on_gpu:
        torch.cuda.synchronize()
    marks = []
    for _ in range(steps):
        marks.append([mark(on_gpu)])
        loss = competitor.forward()
        marks[-1].append(mark(on_gpu))
        competitor.backward(loss)
        marks[-1].append(mark(on_gpu))
        competitor.update()
        marks[-1].append(mark(on_gpu))
    times = [[milliseconds(a, b) for a, b in itertools.pairwise(m)] for m in marks]
    forward, backward, update = (statistics.median(column) for column in zip(*times, strict=True))
    step = statistics.median(map(sum, times))
    blocks = case.batch.anchors.numel()
    row = {
        "step_ms": step,
        "forward_ms": forward,
        "backward_ms": backward,
        "update_ms": update,
        "blocks_per_second": blocks / step * 1e3,
        "tokens_per_second": case.batch.input_ids.numel() / step * 1e3,
        "teraflops": step_arithmetic(case) / step / 1e9,
    }
    if on_gpu:
        kept = sum({t.data_ptr(): t.nbytes for t in competitor.kept()}.values())
        row["gib_over_weights"] = (torch.cuda.max_memory_allocated() - before - kept) / 2**30
    return row


def mark(on_gpu: bool) -> Any:
    """Returns a point in time, of the device's work on a GPU; the host waits for nothing."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(a: Any, b: Any) -> float:
    """Returns the time between two marks; waits until the second has been reached."""
    if isinstance(a, float):
        return (b - a) * 1e3
    b.synchronize()
    return float(a.elapsed_time(b))


def matrix_rate(device: torch.device) -> float:
    """Returns the TFLOP/s of a large matrix product: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    size, times = (8192, 20) if on_gpu else (1024, 5)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    a @ a
    start = mark(on_gpu)
    for _ in range(times):
        a @ a
    return 2 * size**3 * times / milliseconds(start, mark(on_gpu)) / 1e9


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every case; returns its rows, which are in the output too."""
    device = torch.device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    output = Path(options.output) if options.output else None
    rows = read_lines(output)
    peers = [name for name in options.drafters if not name.startswith("ours")]
    for name in {name.split(",")[0] for name in peers}:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not there: see --peers", flush=True)
            options.drafters = [one for one in options.drafters if not one.startswith(name)]
    record = where_and_when(device) | {"matrix_teraflops": matrix_rate(device)}
    print(f"matrix products: {record['matrix_teraflops']:.1f} TFLOP/s", flush=True)
    for shapes in options.shapes:
        lines = _lines(shapes, options)
        if all(any(line.items() <= row.items() for row in rows) for line in lines):
            continue
        fields = {**SHAPES[shapes], "num_hidden_layers": max(TARGET_LAYERS, options.taps + 3)}
        target = random_target(fields, options.tokens + options.block_size, device, dtype)
        case_of = functools.partial(
            make_case,
            target,
            tokens=options.tokens,
            layers=options.layers,
            taps=options.taps,
            block_size=options.block_size,
        )
        # whole logits of many blocks would not fit
        _check(case_of(anchors=min(CHECKED_BLOCKS, *options.anchors)), shapes, options.drafters)
        for anchors in options.anchors:
            case = case_of(anchors=anchors)
            for line in _lines(shapes, options, anchors):
                if any(line.items() <= row.items() for row in rows):
                    continue
                line |= _measured(case, line["drafter"], options) | record
                rows.append(line)
                print(json.dumps(line), flush=True)
                write_lines(output, rows)
        del target, case, case_of
        forget()
    return rows


def _lines(
    shapes: str, options: argparse.Namespace, anchors: int | None = None
) -> list[dict[str, Any]]:
    """Returns what names each row of these shapes, or of one of their cases."""
    return [
        {
            "shapes": shapes,
            "tokens": options.tokens,
            "blocks": min(blocks, options.tokens - 2),
            "block_size": options.block_size,
            "layers": options.layers,
            "taps": options.taps,
            "drafter": name,
        }
        for blocks in (options.anchors if anchors is None else [anchors])
        for name in options.drafters
    ]


def _check(case: Case, shapes: str, drafters: Sequence[str]) -> None:
    print(f"{shapes}: ours against its eager twin {check_ours(case)}", flush=True)
    forget()
    if "specforge" in drafters:
        # its dense attention too: tells a fault of its kernel from one of the comparison
        for attention in dict.fromkeys((SpecForge.default_attention(case), "eager")):
            try:
                found = str(check_specforge(case, attention))
            except Exception as error:  # a peer's fault is a result
                found = short_error(error)
            print(f"{shapes}: specforge ({attention}) against ours: {found}", flush=True)
            forget()


def _measured(case: Case, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a drafter's row, or why there is none: a peer's failure is a result."""
    try:
        row: dict[str, Any] = measure(case, DRAFTERS[name], options.warmup, options.steps)
    except Exception as error:
        if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
            raise
        row = {"failed": short_error(error)}
    forget()
    return row


def short_error(error: Exception) -> str:
    """Returns why something failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"
    )


def forget() -> None:
    """Lets go of what the last drafter needed, compiled code too."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- showing


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a markdown table: each case's drafters, and ours over the fastest peer."""
    head = ("shapes", "blocks", "drafter", "ms", "forward", "backward", "update", "blocks/s")
    head += ("tokens/s", "of matrix rate", "GiB over weights", "ours over it")
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(
                (row["shapes"], f"{row['blocks']:,}", row["drafter"], row["failed"], *[""] * 8)
            )
            continue
        same = [r for r in rows if _case(r) == _case(row) and "failed" not in r]
        ours = [r["blocks_per_second"] for r in same if r["drafter"] == "ours"]
        ratio = f"{ours[0] / row['blocks_per_second']:.2f}" if ours else ""
        memory = row.get("gib_over_weights")
        lines.append(
            (
                row["shapes"],
                f"{row['blocks']:,}",
                row["drafter"],
                *(f"{row[f'{part}_ms']:.1f}" for part in ("step", "forward", "backward", "update")),
                f"{row['blocks_per_second']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['teraflops'] / row['matrix_teraflops']:.0%}",
                "" if memory is None else f"{memory:.2f}",
                ratio,
            )
        )
    return "\n".join(markdown_rows(head, lines))


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what each case's ratios are asked for: of speed, of memory, of the full loss."""
    lines = []
    for case in dict.fromkeys(map(_case, rows)):
        done = {r["drafter"]: r for r in rows if _case(r) == case and "failed" not in r}
        ours, plainly = (done.pop(name, None) for name in ("ours", "ours, cross-entropy only"))
        peers = [row for name, row in done.items() if not name.startswith("ours")]
        if ours is None or not peers:
            continue
        peer = max(peers, key=lambda row: float(row["blocks_per_second"]))
        line = (
            f"{ours['shapes']}, {ours['blocks']:,} blocks: "
            f"{ours['blocks_per_second'] / peer['blocks_per_second']:.2f} times the blocks a "
            f"second of {peer['drafter']}"
        )
        if "gib_over_weights" in ours:
            memory = ours["gib_over_weights"] / peer["gib_over_weights"]
            line += f", {memory:.3f} of its memory over weights"
        if plainly is not None:
            slower = ours["step_ms"] / plainly["step_ms"] - 1
            line += f"; the full loss takes {slower:+.1%} over cross-entropy alone"
        lines.append(line)
    return lines


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row[name] for name in ("shapes", "tokens", "blocks", "block_size", "layers", "taps")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--anchors", nargs="+", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--taps", type=int, default=5)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--drafters", nargs="+", choices=list(DRAFTERS))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peers", help="folder that the other packages were installed into")
    parser.add_argument("--output", help="JSON lines; what is there is not run again")
    parser.add_argument("--toy", action="store_true", help="small shapes, fp32, on the CPU")
    options = parser.parse_args(arguments)
    small: dict[str, Any] = {
        "shapes": ["toy"],
        "anchors": [8, 64],
        "tokens": 256,
        "layers": 2,
        "drafters": list(TOY),
    }
    full: dict[str, Any] = {
        "shapes": ["llama3-8b", "qwen3-8b", "smollm2"],
        "anchors": [64, 512, 2048],
        "tokens": 2048,
        "layers": 5,
        "drafters": list(DRAFTERS),
    }
    for name, value in (small if options.toy else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    with one_sentence_errors():
        if not options.toy and not torch.cuda.is_available():
            raise UserError("There is no GPU here; --toy runs a small version on the CPU.")
        if options.peers:
            sys.path.append(options.peers)  # what they need may be here in a version of its own
        rows = run(options)
        print("\n".join([show(rows), "", *bars(rows)]))


if __name__ == "__main__":
    main()
