"""The commands of docs/own-model.md, as they stand there: from a model to a served drafter."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import data.regenerate
import drafter.export
import evaluate
from tests.documentation import DOCS, commands
from tests.runs import ROOT, train
from tests.tiny import tiny_target_dir

SHOWN = [" ".join(command.words) for command in commands(DOCS / "own-model.md")]
FIVE, PUBLIC, DOCTOR = SHOWN[:5], SHOWN[5:7], SHOWN[7]
TARGET = ROOT / ".target" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROGRAMS = {
    "python -m data.regenerate": data.regenerate.main,
    "python train.py": train,
    "python evaluate.py": evaluate.main,
    "python -m drafter.export": drafter.export.main,
}


def run(command: str, small: dict[str, str], names: dict[str, str]) -> None:
    """Runs a command in this process.

    Args:
        command: As the page has it.
        small: Further flags by program, that make it small.
        names: What stands for names on the page.
    """
    program = next(one for one in PROGRAMS if command.startswith(one))
    words = command.removeprefix(program).split()
    words = [names.get(word, word) for word in words]
    PROGRAMS[program]([*words, *small.get(program, "").split()])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with our configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_shows_five_commands_two_and_the_doctor():
    assert [next(one for one in PROGRAMS if command.startswith(one)) for command in SHOWN] == [
        "python -m data.regenerate",
        "python train.py",
        "python evaluate.py",
        "python -m drafter.export",
        "python -m drafter.export",
        "python train.py",
        "python evaluate.py",
        "python evaluate.py",
    ]


def test_five_commands_take_a_small_model_to_a_served_drafter(place, capsys):
    Path(tiny_target_dir(place, "qwen3", max_position_embeddings=1024)).rename(place / "my-model")
    prompts = [{"prompt": f"What is the sum of {i} and three?"} for i in range(12)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    small = {
        "python -m data.regenerate": "--max-new-tokens 16",
        "python train.py": "--trainer.accelerator cpu --trainer.precision 32 --trainer.max_epochs 1"
        " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
        " --model.num_layers 1 --model.num_taps 1 --model.block_size 4 --data.val_rows 4"
        " --data.batch_size 4 --data.num_anchors 4 --verification.max_new_tokens 16",
        "python evaluate.py": "--limit 4 --max-new-tokens 16 --no-progress",
    }
    for command in FIVE:
        run(command, small, {})
    printed = capsys.readouterr().out
    assert "vllm serve my-model --speculative-config" in printed
    assert "--speculative-draft-model-path my-drafter" in printed
    report = json.loads((place / "runs/mine/report.json").read_text())
    (measured,) = report["drafters"]
    assert measured["figures"]["replay"]["sets"]["prompts"]["prompts"] == 4
    (overlap,) = report["overlap"].values()
    assert overlap["prompts"]["prompts"] == 4
    assert overlap["prompts"]["whole"] == 0  # they were held out
    acceptance = json.loads((place / "my-drafter/acceptance.json").read_text())
    (accepted,) = acceptance["measured"]
    assert accepted["sets"]["prompts"]["accepted_length"]["value"] >= 1

    with contextlib.suppress(SystemExit):  # of code 1, if it finds a fault
        run(DOCTOR, {"python evaluate.py": "--rows 2"}, {})
    said = capsys.readouterr().out
    assert "likely cause" in said or "no known fault" in said

    (place / "my-drafter").rename(place / "public-drafter")
    for command in PUBLIC:
        run(command, small, {})
    both = json.loads((place / "runs/from-public/before-after.json").read_text())
    assert [one["name"] for one in both["drafters"]] == ["public-drafter", "from-public"]
    assert both["comparisons"]


@pytest.mark.slow
def test_a_little_data_makes_a_public_drafter_better_on_the_small_target(place, capsys):
    prompts = (ROOT / "assets" / "quickstart_prompts.jsonl").read_text()
    (place / "prompts.jsonl").write_text(prompts)
    names = {"my-model": str(TARGET), "public-drafter": str(ROOT / "assets" / "smollm2-drafter")}
    small = {
        "python -m data.regenerate": "--max-new-tokens 72",
        "python train.py": "--trainer.accelerator cpu --trainer.precision 32 --trainer.max_epochs 1"
        " --trainer.enable_progress_bar false --data.val_rows 18 --data.batch_size 2"
        " --data.num_anchors 24 --verification.max_new_tokens 72",
        "python evaluate.py": "--limit 18 --max-new-tokens 72 --no-progress --dtype float32",
    }
    few = {**small, "python train.py": small["python train.py"] + " --data.limit_rows 26"}
    for command in FIVE:
        run(command, few, names)
    assert f"vllm serve {TARGET}" in capsys.readouterr().out
    for command in PUBLIC:
        run(command, small, names)
    result = json.loads((place / "runs/from-public/before-after.json").read_text())
    before, after = (
        one["figures"]["replay"]["sets"]["prompts"]["accepted_length"]["value"]
        for one in result["drafters"]
    )
    assert after > before + 0.2
    (compared,) = [
        one
        for one in result["comparisons"]
        if (one["set"], one["figure"]) == ("prompts", "accepted_length")
    ]
    assert (compared["a"], compared["b"]) == ("smollm2-drafter", "from-public")
    assert compared["verdict"] == "worse"
    with capsys.disabled():
        print(f"accepted length before {before:.3f}, after {after:.3f}: {compared}")
