"""Guards the growth benchmark: one setting changes at a time, and rows are kept."""

from __future__ import annotations

import json

import pytest

from benchmarks import growth


def test_one_setting_changes_at_a_time_and_rows_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "TOY_AXES", {"tokens": (64, 128), "rows": (1, 2)})
    monkeypatch.setattr(growth, "TOY_BASE", growth.TOY_BASE | {"tokens": 64})
    output, picture = tmp_path / "growth.jsonl", tmp_path / "growth.png"
    words = ["--toy", "--layers", "1", "--steps", "1", "--output", str(output)]
    growth.main([*words, "--plot", str(picture)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["axis"], r["tokens"], r["rows"]) for r in rows] == [
        ("tokens", 64, 1),
        ("tokens", 128, 1),
        ("rows", 64, 1),
        ("rows", 64, 2),
    ]
    assert all(row["step_ms"] > 0 for row in rows)
    assert "| rows (B) | 2 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(growth, "measure", None)
    growth.main(words)  # nothing is measured again


def test_the_exponent_is_that_of_a_power():
    assert growth.exponent([(1, 9), (2, 3.0), (4, 12.0)]) == pytest.approx(2.0)
    assert growth.exponent([(1, 3.0), (8, 3.0)]) == 0.0
    assert growth.exponent([(1, 3.0)]) != growth.exponent([(1, 3.0)])
