"""Guards the decoding benchmark: it checks every way before it is timed, and says what is kept."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import decode
from drafter.draft_length import DraftLength, write_draft_length
from drafter.sampling import GREEDY

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
        assert row["ms_plain"] > 0
        assert row["speedup"] > 0
    (speculative,) = (row for row in rows if (row["way"], row["rows"]) == ("speculative", 1))
    assert min(speculative[f"ms_{name}"] for name in ("draft", "verify")) > 0
    assert speculative["drafted"] == 3
    said = capsys.readouterr().out
    assert "rows 2:" in said
    assert "of it is kept" in said


def test_searches_and_cut_drafts_are_held_beside_the_one_draft(tmp_path, capsys):
    output, plot, rule = (tmp_path / name for name in ("rows.jsonl", "plot.png", "rule.json"))
    record = {"fingerprint": "toy", "block_size": 4, "sampling": asdict(GREEDY)}
    write_draft_length(DraftLength(0.5), rule, record)
    options = ["--search", "plain", "tree", "self-select", "--budget", "4", "12", "--drafts", "2"]
    options += ["--draft-length", str(rule), "--ways", "recorded", "--plot", str(plot)]
    decode.main([*WORDS[:-3], "--rows", "1", "--output", str(output), *options])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["way"], row.get("drafts")) for row in rows] == [
        ("target alone", None),
        ("speculative", "one draft"),
        ("tree of 4", "tree"),
        ("tree of 12", "tree"),
        ("2 drafts", "self-select"),
        ("draft while 0.5 likely", "cut draft"),
    ]
    for row in rows[1:]:
        assert row["drafter"] == "toy"
        assert row["same"] == 1.0
        assert row["tau"] >= 1
        assert min(row[name] for name in ("ms_draft", "ms_verify", "speedup")) > 0
    assert all(row["ms_host"] > 0 for row in rows[2:])
    drafted = [row["drafted"] for row in rows[1:]]
    assert drafted[:3] == [3, 4, 12]
    assert drafted[4] <= 3 <= drafted[3] <= 6
    assert rows[3]["tau"] >= rows[2]["tau"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "| tree of 12 | 1 |" in said
    assert "fastest: " in said
    assert "transformers" not in said


def test_a_draft_length_of_another_drafter_is_refused(tmp_path, capsys):
    rule = tmp_path / "rule.json"
    record = {"fingerprint": "of another", "block_size": 4, "sampling": asdict(GREEDY)}
    write_draft_length(DraftLength(0.5), rule, record)
    with pytest.raises(SystemExit):
        decode.main([*WORDS, "--draft-length", str(rule)])
    assert "found for another drafter or block size" in capsys.readouterr().err


def test_two_drafters_are_told_apart():
    times = {"ms_plain": 2.0, "ms_draft": 1.0, "ms_verify": 3.0, "drafted": 9.0, "rows": 1}
    figures = [
        ("target alone", None, None, 100.0),
        ("speculative", "a", "one draft", 135.0),
        ("speculative", "b", "one draft", 150.0),
        ("tree of 60", "a", "tree", 180.0),
        ("tree of 60", "b", "tree", 120.0),
    ]
    rows = [
        {"way": way, "tokens_per_second": value, "tau": 3.0, "same": 1.0, **times}
        | ({"drafter": name, "drafts": drafts} if name else {})
        for way, name, drafts, value in figures
    ]
    del rows[0]["tau"]
    decode.add_speedups(rows)
    assert [row["speedup"] for row in rows] == [1.0, 1.35, 1.5, 1.8, 1.2]
    lines = decode.bars(rows)
    assert [line.split(":")[0] for line in lines] == ["a", "a", "b", "b"]
    assert lines[1].endswith("fastest: tree of 60, 1.80 of the target alone")
    assert lines[3].endswith("fastest: speculative, 1.50 of the target alone")
    table = decode.show(rows).splitlines()
    assert table[0].startswith("| drafter | way |")
    assert table[-1].startswith("| b | tree of 60 | 1 | 120.0 | 1.20 | 3.000 |")
    assert decode.picture(rows).startswith(b"\x89PNG")


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
    target, drafters, prompts = toy
    own = list(decode.ways(target, drafters, 4, 10, [1]))[2]
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
        | ({"drafter": "a", "drafts": "one draft"} if way == "speculative" else {})
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
