"""Guards the decoding benchmark: it checks every way before it is timed, and says what is kept."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode

WORDS = ["--toy", "--limit", "2", "--max-new-tokens", "10", "--rows", "1", "2"]


@pytest.fixture(scope="module")
def toy():
    options = decode.argparse.Namespace(limit=2, max_new_tokens=10)
    return decode._toy(options)


def test_every_way_is_checked_measured_and_kept(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    decode.main([*WORDS, "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = [(row["way"], row["rows"]) for row in rows]
    assert names == [
        ("transformers, target alone", 1),
        ("transformers, prompt lookup", 1),
        ("target alone, kernel by kernel", 1),
        ("speculative, kernel by kernel", 1),
        ("target alone", 1),
        ("speculative", 1),
        ("target alone", 2),
        ("speculative", 2),
    ]
    for row in rows:
        assert row["same"] == 1.0
        assert row["tokens"] == rows[0]["tokens"] * (1 if row["rows"] == 1 else 3)
        assert row["gap"] <= 1e-3
        assert min(row[f"ms_{name}"] for name in ("plain", "draft", "verify")) > 0
    said = capsys.readouterr().out
    assert "rows 2:" in said
    assert "of it is kept" in said


@torch.no_grad()
def test_a_way_that_emits_what_the_target_would_not_is_not_timed(toy):
    target, _, prompts = toy
    wrong = decode.Way("wrong", lambda prompts: [[7] * 10 for _ in prompts])
    with pytest.raises(AssertionError, match="below the target's choice"):
        decode.check(target, wrong, prompts, [])
    wrong.ours = False  # another's fault is a result
    found = decode.check(target, wrong, prompts, [[7] * 10, [8] * 10])
    assert found["gap"] > 0.1
    assert found["same"] == 0.5


@torch.no_grad()
def test_in_fp32_ours_must_be_the_same_to_the_token(toy):
    target, drafter, prompts = toy
    own = decode.ways(target, drafter, 4, 10, [1])[2]
    expected = own.decode(prompts)
    assert decode.check(target, own, prompts, expected)["same"] == 1.0
    shorter = [ids[:-1] for ids in expected]
    with pytest.raises(AssertionError, match="2 responses are not the target's own"):
        decode.check(target, own, prompts, shorter)


def test_bars_are_ratios_of_the_same_run():
    times = {"ms_plain": 2.0, "ms_draft": 1.0, "ms_verify": 3.0}
    figures = {
        ("transformers, target alone", 1): 30.0,
        ("transformers, prompt lookup", 1): 50.0,
        ("target alone", 1): 100.0,
        ("speculative", 1): 135.0,
        ("target alone", 8): 400.0,
        ("speculative", 8): 200.0,
    }
    rows = [
        {"way": way, "rows": rows, "tokens_per_second": value, "tau": 3.0, **times}
        for (way, rows), value in figures.items()
    ]
    first, second, third = decode.bars(rows)
    assert "1.35; tau x t_plain / (t_draft + t_verify) is 1.50, so 0.90 of it is kept" in first
    assert first.endswith("0.45 of tau")
    assert second.endswith("(transformers, prompt lookup): 2.70")
    assert third == "rows 8: 0.50 of the target alone"


def test_what_is_missing_is_one_sentence(capsys):
    for words, said in (([], "--ckpt"), (["--toy", "--rows", "8"], "one prompt at a time")):
        with pytest.raises(SystemExit) as stop:
            decode.main(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
