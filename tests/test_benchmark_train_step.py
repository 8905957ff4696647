"""Guards the step benchmark: it checks before it times and keeps its rows, a peer's failure too.

The peers themselves are not installed here; a stand-in takes their place.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import train_step
from benchmarks.competitors import Ours, full_stack, make_case, plain, step_arithmetic
from benchmarks.shapes import SHAPES, random_target

WORDS = ["--toy", "--tokens", "64", "--warmup", "2", "--steps", "2", "--layers", "1"]


@pytest.fixture(scope="module")
def case():
    target = random_target(SHAPES["toy"], 128, "cpu", torch.float32)
    return make_case(target, tokens=64, anchors=5, layers=2, taps=2, block_size=4, seed=0)


def test_a_step_that_computes_something_else_is_not_timed(case, monkeypatch):
    found = train_step.check_ours(case)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-5
    monkeypatch.setattr(train_step, "_ours", lambda case, loss, name: Ours(case, plain()))
    with pytest.raises(AssertionError, match="differs from what it should be"):
        train_step.check_ours(case)


def test_rows_are_kept_and_not_measured_again(tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    words = [*WORDS, "--output", str(output), "--anchors", "4", "9"]
    train_step.main(words)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["blocks"], row["drafter"]) for row in rows] == [
        (blocks, name) for blocks in (4, 9) for name in ("ours", "ours, cross-entropy only")
    ]
    for row in rows:
        assert row["step_ms"] > 0
        assert row["blocks_per_second"] > 0
        assert row["revision"]
    said = capsys.readouterr().out
    assert "specforge is not there: see --peers" in said
    assert "| toy | 4 | ours |" in said
    monkeypatch.setattr(train_step, "measure", None)
    monkeypatch.setattr(train_step, "random_target", None)
    train_step.main(words)  # nothing is measured
    assert len(output.read_text().splitlines()) == 4


def test_a_peers_failure_is_a_row_and_ours_is_an_error(case, monkeypatch):
    def fails(case):
        raise RuntimeError("no kernel\nfor this")

    def too_large(case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = train_step.argparse.Namespace(warmup=1, steps=1)
    monkeypatch.setitem(train_step.DRAFTERS, "specforge", fails)
    row = train_step._measured(case, "specforge", options)
    assert row == {"failed": "RuntimeError: no kernel"}
    monkeypatch.setitem(train_step.DRAFTERS, "ours", too_large)
    assert train_step._measured(case, "ours", options) == {"failed": "out of memory"}
    monkeypatch.setitem(train_step.DRAFTERS, "ours", fails)
    with pytest.raises(RuntimeError):
        train_step._measured(case, "ours", options)


def test_the_table_says_how_much_faster_ours_is():
    base = {"shapes": "toy", "tokens": 64, "block_size": 4, "layers": 1, "taps": 2}
    base["matrix_teraflops"] = 2.0
    times = dict.fromkeys(("step_ms", "forward_ms", "backward_ms", "update_ms"), 1.0)
    times |= {"tokens_per_second": 1.0, "teraflops": 1.0}
    rows = [
        base | times | {"blocks": 4, "drafter": "ours", "blocks_per_second": 30.0},
        base | times | {"blocks": 4, "drafter": "peer", "blocks_per_second": 20.0},
        base | {"blocks": 4, "drafter": "other", "failed": "out of memory"},
        base | times | {"blocks": 9, "drafter": "peer", "blocks_per_second": 20.0},
    ]
    lines = [line.split(" | ") for line in train_step.show(rows).splitlines()[2:]]
    assert [line[-1].strip(" |") for line in lines] == ["1.00", "1.50", "", ""]
    assert lines[0][9] == "50%"
    assert lines[2][3] == "out of memory"


def test_arithmetic_counts_every_matrix_product(case):
    """Counts the operations of a real forward and backward, as torch does, and compares."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ours = Ours(case, full_stack())
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ours.backward(ours.forward())
    # here what the mask hides is computed too
    slots = case.batch.anchors.numel() * case.block_size
    seen = float(case.batch.anchors.sum()) * case.block_size + slots * case.block_size
    hidden_pairs = slots * (64 + slots) - seen
    dense = 2.0 * 3 * case.layers * 2 * hidden_pairs * case.target.hidden_size
    assert counter.get_total_flops() == step_arithmetic(case) + dense


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train_step.main([])
    assert stop.value.code == 2
    assert "--toy" in capsys.readouterr().err


def test_the_bars_are_ratios_to_the_fastest_peer():
    case = {"shapes": "toy", "tokens": 64, "blocks": 512, "block_size": 4, "layers": 1, "taps": 2}

    def row(drafter, ms, **more):
        return case | {"drafter": drafter, "step_ms": ms, "blocks_per_second": 1e3 / ms, **more}

    rows = [
        row("ours", 100.0, gib_over_weights=2.0),
        row("ours, cross-entropy only", 80.0, gib_over_weights=2.0),
        row("slow", 300.0, gib_over_weights=3.0),
        row("fast", 150.0, gib_over_weights=5.0),
        case | {"drafter": "none", "failed": "no kernel"},
    ]
    assert train_step.bars(rows) == [
        "toy, 512 blocks: 1.50 times the blocks a second of fast, 0.400 of its memory over "
        "weights; the full loss takes +25.0% over cross-entropy alone"
    ]
    assert train_step.bars(rows[:2]) == []  # nothing to compare with
