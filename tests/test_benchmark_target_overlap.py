"""Guards the benchmark of the target's pass beside the drafter's step."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import target_overlap


def test_it_times_both_in_turn_and_at_once_and_keeps_rows(tmp_path, monkeypatch, capsys):
    output = tmp_path / "overlap.jsonl"
    words = ["--toy", "--steps", "1", "--output", str(output)]
    target_overlap.main(words)
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["shapes"] == "toy"
    assert all(row[f"{name}_ms"] > 0 for name in ("target", "step", "in_turn", "at_once"))
    assert "| toy |" in capsys.readouterr().out
    monkeypatch.setattr(target_overlap, "measure", None)
    target_overlap.main(words)  # nothing is measured again


def test_what_is_saved_is_a_share_of_both_in_turn():
    row = {
        "shapes": "x",
        "target_ms": 30.0,
        "step_ms": 20.0,
        "in_turn_ms": 50.0,
        "at_once_ms": 40.0,
    }
    assert target_overlap.show([row]).splitlines()[-1] == (
        "| x | 30.0 | 20.0 | 50.0 | 60% | 40.0 | 20.0% |"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        target_overlap.main(["--shapes", "toy"])
    assert "There is no GPU here" in capsys.readouterr().err
