"""predict and report on a trained tiny drafter: exact text, figures that agree across modes."""

from __future__ import annotations

import json

import pytest
import torch

import evaluate
from tests.runs import ROOT, cli, find_target

PROMPTS, GRID = str(ROOT / "assets/showcase.jsonl"), str(ROOT / "configs/ablation/cumulative.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = cli(folder, trainer__max_epochs=12, model__learning_rate=5e-3, data__val_rows=1)
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"What is the sum of two and three? {i}"} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, run, prompts


def test_predict_writes_the_targets_own_greedy_text(trained):
    folder, run, prompts = trained
    out = folder / "out.jsonl"
    cli(
        folder,
        "predict",
        extra=("--ckpt_path", str(folder / "run" / "checkpoints" / "last.ckpt")),
        data__predict_prompts=str(prompts),
        model__decoding={"max_new_tokens": 20},
        predictions__output=str(out),
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(6))
    target = run.datamodule.target
    expected = target.generate([line["prompt_ids"] for line in lines], 20)
    assert [line["response_ids"] for line in lines] == [r.ids for r in expected]
    for line in lines:
        assert sum(line["round_lengths"]) == len(line["response_ids"]) - 1
        assert line["text"]
        assert line["tokens_per_second"] > 0


def test_report_by_replay_equals_report_by_the_real_loop(trained, capsys, monkeypatch):
    folder, _, prompts = trained
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    results = {}
    for mode in ("replay", "decode"):
        out = folder / f"{mode}.json"
        evaluate.main(
            [
                "report",
                "--ckpt",
                str(folder / "run"),
                "--prompts",
                str(prompts),
                "--mode",
                mode,
                "--max-new-tokens",
                "20",
                "--output",
                str(out),
            ]
        )
        results[mode] = json.loads(out.read_text())["drafters"][0]
    printed = capsys.readouterr().out
    assert "accepted length" in printed
    assert "prompts" in printed
    replayed, decoded = (
        results[mode]["figures"][mode]["sets"]["prompts"] for mode in ("replay", "decode")
    )
    for key, value in replayed.items():
        if "all_anchors" not in key and not key.startswith("ms_"):
            assert decoded[key] == value, key
    assert decoded["tokens_per_second_plain"]["value"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "nowhere.ckpt", "--prompts", PROMPTS], "nowhere.ckpt"),
        (["--ckpt", str(ROOT / "README.md"), "--prompts", PROMPTS], "not a checkpoint"),
        # what needs no drafter and no target is said before they are looked for
        (["--ckpt", "nowhere.ckpt"], "nothing to measure on"),
        (["--ckpt", "nowhere.ckpt", "--prompts", "p.jsonl"], "p.jsonl: no such file or folder"),
        (["--ckpt", "nowhere.ckpt", "--benchmarks", "nope"], "no benchmark is named nope"),
        (
            ["--ckpt", "nowhere.ckpt", "--benchmarks", "nope", "--benchmark-dir", str(ROOT)],
            "nope.jsonl: no such file or folder",
        ),
        (
            ["--ckpt", "nowhere.ckpt", "--prompts", PROMPTS, "--draft-length", "none.json"],
            "evaluate.py calibrate makes it",
        ),
        (
            ["--ckpt", "nowhere.ckpt", "--prompts", PROMPTS, "--budget", "30"],
            "--budget is of --search tree; give both",
        ),
        (
            ["--ckpt", "nowhere.ckpt", "--prompts", PROMPTS, "--search", "tree", "--drafts", "2"],
            "--drafts is of --search self-select; give both",
        ),
        (
            ["calibrate", "--ckpt", "nowhere.ckpt", "--prompts", "p.jsonl", "--output", "o.json"],
            "p.jsonl: no such file or folder",
        ),
        (
            ["ablation", "--config", GRID, "--output", "o", "--dry-run", "--benchmarks", "nope"],
            "no benchmark is named nope",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("flag", "wrong", "least"),
    [("--seeds", "0", 1), ("--max-new-tokens", "0", 1), ("--limit", "0", 1), ("--skip", "-1", 0)],
)
def test_counts_are_checked_as_they_are_read(flag, wrong, least, capsys):
    words = ["ablation", "--config", GRID, "--output", "o", "--dry-run", "--prompts", PROMPTS]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, flag, wrong])
    assert stop.value.code == 2
    assert f"argument {flag}: {wrong} is no whole number from {least} up" in capsys.readouterr().err


def test_doctor_looks_at_a_row_at_least(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["doctor", "--ckpt", "nowhere.ckpt", "--rows", "0"])
    assert stop.value.code == 2
    assert "argument --rows: 0 is no whole number from 1 up" in capsys.readouterr().err


def test_a_drafter_of_another_target_is_refused(trained, tmp_path, capsys):
    from tests.tiny import tiny_target_dir

    folder, _, prompts = trained
    other = tiny_target_dir(tmp_path, "llama", num_hidden_layers=6)
    assert str(find_target(folder)) != other
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", str(folder / "run"), "--prompts", str(prompts), "--target", other])
    assert "was made for a target" in capsys.readouterr().err
    assert torch.is_grad_enabled()
