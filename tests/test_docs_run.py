"""Every command of README and docs is run on a tiny target, or its page says what it needs.

A command is run as it stands: what it names (TARGET, rows.jsonl.gz, runs/a, ...) lies in the folder
that it is run in, made by another command of the pages where there is one. Flags that it does not
show make it small. The commands of docs/own-model.md are run by tests/test_own_model.py.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import data.regenerate
from tests import documentation
from tests.documentation import PAGES, commands
from tests.runs import QUESTIONS, ROOT, train
from tests.test_docs import ELIDED
from tests.tiny import tiny_target_dir

Words = tuple[str, ...]
FOUND = [one for page in PAGES if page.stem != "own-model" for one in commands(page)]
NEEDS = {
    "GPU": r"--device cuda|accelerator gpu|torchrun --n|device_map|configs/targets/|configs/tuning/"
    r"|-m benchmarks\.(?!tuning show)(?!.*--toy)|--dtype bfloat16 .*--batch-size 256"
    r"|--batch-size 256 .*--dtype bfloat16",
    "network": r"--benchmarks (?!.*--benchmark-dir)|preset:|configs/targets/"
    r"|make (quickstart|setup|docs)",
}
"""How a command is told that can't be run here; any other is run."""
BY_CI = {("make", "test"), ("make", "setup")}
SLOW = {
    ("make", "bench"): "tests/test_benchmark_*.py",
    ("torchrun", "-m", "data.cache", "build", "..."): "the same without torchrun",
    ("python", "-m", "data.lengthen", "--responses"): "docs/recipes.md's",
    ("python", "train.py", "fit", "--config", "configs/own-model.yaml"): "tests/test_own_model.py",
    # on the real target
    ("make", "quickstart"): "other runs and reports",
    ("python", "evaluate.py", "report", "--ckpt", "assets/smollm2-drafter"): "other reports",
    ("python", "train.py", "predict", "--config", "configs/smollm2.yaml"): "docs/recipes.md's",
    ("python", "train.py", "predict", "--config", "runs/quickstart/config.yaml"): "likewise",
}
"""How commands begin that `make test-slow` runs, and what runs the like in `make test`."""
SMALL = {
    "train.py fit": {
        "--data.target": "TARGET",
        "--data.val_rows": "2",
        "--data.num_anchors": "4",
        "--data.num_workers": "0",
        "--verification.prompts_per_set": "2",
        "--verification.max_new_tokens": "8",
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": "1",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
    },
    "train.py predict": {"--model.decoding.max_new_tokens": "4", "--trainer.accelerator": "cpu"},
    "evaluate.py report": {"--limit": "2", "--max-new-tokens": "12"},
    "evaluate.py calibrate": {"--max-new-tokens": "12"},
    "evaluate.py doctor": {"--rows": "2"},
    "evaluate.py ablation": {"--limit": "1", "--max-new-tokens": "12", "--budget": "0.5"},
    "data.cache build": {
        "--target": "TARGET",
        "--val_rows": "2",
        "--prompts_per_set": "2",
        "--max_new_tokens": "8",
    },
    "data.regenerate": {"--max-new-tokens": "12"},
    "data.lengthen": {"--max-new-tokens": "24"},
}
"""Flags by program and verb, for a command that does not show them."""
FIRST = "python train.py fit --config configs/smollm2.yaml --data.train_data"
MADE = {
    "runs/a": f"{FIRST} rows.jsonl.gz --run_dir runs/a",
    "runs/b": "python train.py fit --config configs/smollm2.yaml --model.init_from runs/a "
    "--model.learning_rate 1e-3 --run_dir runs/b",
    "runs/smollm2": f"{FIRST} my_rows.jsonl.gz",
    "runs/quickstart": "make quickstart",
    "responses.jsonl.gz": "python -m data.regenerate --target TARGET --prompts prompts.jsonl "
    "--output responses.jsonl.gz",
    "sampled.jsonl.gz": "python -m data.regenerate --target TARGET --prompts prompts.jsonl "
    "--output sampled.jsonl.gz --temperature 0.7 --seed 1",
    "cache": "python -m data.cache build --from configs/smollm2.yaml --train_data rows.jsonl.gz "
    "--output cache",
    "out.json": "python evaluate.py report --ckpt runs/a --ckpt runs/b --prompts prompts.jsonl "
    "--output out.json",
    "length.json": "python evaluate.py calibrate --ckpt runs/a --prompts held_out.jsonl --output "
    "length.json",
    "my-drafter": "python -m drafter.export runs/a --output my-drafter --results out.json",
    "DIR": "python -m drafter.export runs/a --output DIR --results out.json",
}
"""The commands of the pages that make what other commands name."""


def needs(words: Words) -> set[str]:
    """Returns what keeps a command from being run here."""
    return {need for need, told in NEEDS.items() if re.search(told, " ".join(words))}


RUN = [one.words for one in FOUND if not needs(one.words) and one.words not in BY_CI]
RUN += [("make", "quickstart")]  # its commands: what it would fetch is there
RUN = list(dict.fromkeys(RUN))


def is_slow(words: Words) -> bool:
    """Returns whether `make test` passes over a command: it is in SLOW, or like one before it."""
    like = next(one for one in RUN if shape(one) == shape(words))
    return like != words or any(words[: len(start)] == start for start in SLOW)


def shape(words: Words) -> Words:
    """Returns a command without the values of its flags."""
    return tuple(
        word for i, word in enumerate(words) if i < 4 or word.startswith("-") or ".yaml" in word
    )


@pytest.mark.parametrize("command", [one for one in FOUND if needs(one.words)], ids=str)
def test_a_command_that_is_not_run_is_marked_on_its_page(command):
    missing = needs(command.words) - command.needs
    assert not missing, f"{command} needs {missing}: the page does not say so"


def test_a_card_that_gave_a_figure_is_no_mark(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "2.0 times (`make a`, one H100, 2026).\n\n2.0 times (on a GPU: `make b`).\n\n"
        "As NVIDIA H200 measured:\n\n    make c\n    make d  # GPU\n\n"
        "```\n# GPUs\nmake e\nmake f   # GPU, network\nmake g\n```\n"
    )
    monkeypatch.setattr(documentation, "ROOT", tmp_path)
    told = {one.words[1]: set(one.needs) for one in commands(page)}
    both = {"GPU", "network"}
    gpu = {"GPU"}
    assert told == {"a": set(), "b": gpu, "c": set(), "d": gpu, "e": gpu, "f": both, "g": gpu}


def test_every_exception_is_a_command_that_is_shown():
    starts = {words[: len(start)] for start in SLOW for words in RUN}
    assert starts >= SLOW.keys()


def test_ci_runs_what_it_is_said_to_run():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntest: lint " in makefile
    assert "\nlint: $(STAMP)\n" in makefile
    assert "\nsetup: $(STAMP)\n" in makefile


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages' commands name and none of them makes."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "assets", "docs", ".target"):
        (folder / name).symlink_to(ROOT / name)
    tiny = tiny_target_dir(folder, num_hidden_layers=6, max_position_embeddings=1024)
    Path(tiny).rename(folder / "TARGET")
    prompts = [{"prompt": f"{QUESTIONS[i % 3]} {i}"} for i in range(6)]
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for name in ("my_benchmarks", "my_prompts", "data"):
        (folder / name).mkdir()
    turns = [{"turns": [QUESTIONS[0], QUESTIONS[1]]}, {"turns": [QUESTIONS[2]]}]
    for path in (folder / "my_benchmarks" / "mt-bench.jsonl", folder / "my_prompts" / "mine.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in turns))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        words = ["--target", "TARGET", "--prompts", "prompts.jsonl", "--max-new-tokens", "12"]
        data.regenerate.main([*words, "--output", "greedy.jsonl.gz"])  # shown with --device cuda
        settings = Path("greedy.jsonl.gz.settings.json")
        for name in ("rows", "my_rows", "data/greedy", "data/sampled"):
            shutil.copy("greedy.jsonl.gz", f"{name}.jsonl.gz")
            shutil.copy(settings, f"{name}.jsonl.gz.settings.json")
        yield folder


@pytest.mark.parametrize(
    "words",
    [pytest.param(one, id=" ".join(one), marks=[pytest.mark.slow] * is_slow(one)) for one in RUN],
)
def test_a_command_runs(words, place):
    if words[:3] == ("python", "evaluate.py", "merge"):
        for i, part in enumerate(words[3:5]):
            other = f"python evaluate.py report --ckpt runs/a --prompts prompts.jsonl --skip {i}"
            run((*other.split(), "--limit", "1", "--output", part), set())
    run(words, set())


def run(words: Words, asked: set[str]) -> None:
    """Runs a command, and before it those that make what it names and is not there.

    Args:
        words: The command.
        asked: What is being made.
    """
    for word in re.findall(r"[^\[\],\s]+", " ".join(words)):
        name = word.removesuffix("/config.yaml")
        if name in MADE and name != wrote(words) and not Path(name).exists():
            assert name not in asked
            maker = tuple(MADE[name].split())
            assert maker in RUN, f"no page shows {MADE[name]}"
            run(maker, asked | {name})
    before = stamps(wrote(words))
    if words[0] == "make":
        for line in recipe(words[1]):
            run(line, asked)
    elif words[0] == "tensorboard":
        look_at_tensorboard(list(words))
    elif words[0] == "torchrun":
        run_processes(list(words))
    elif words[1] == "-m":
        run_program(words[2], list(words[3:]))
    else:
        run_program(words[1], list(words[2:]))
    if wrote(words):  # now, not by another command before it
        assert stamps(wrote(words)) - before


def stamps(path: str) -> set[tuple[Path, int, int]]:
    """Returns the files of a file or folder with inode and time of change; none for "".

    Those of path-2, -3, ... are among them: a run goes there while its folder holds another.
    """
    if not path:
        return set()
    roots = [Path(path), *Path(path).parent.glob(f"{Path(path).name}-[0-9]*")]
    files = [file for root in roots for file in (root, *root.rglob("*")) if file.is_file()]
    return {(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def wrote(words: Words) -> str:
    """Returns what a command is to write, "" for nothing that it names."""
    for flag in ("--output", "--run_dir", "--plot", "--predictions.output"):
        if flag in words and (flag != "--run_dir" or "fit" in words):
            return words[words.index(flag) + 1]
    return ""


def recipe(target: str) -> list[Words]:
    """Returns the commands of ours that a target of the Makefile has."""
    text = (ROOT / "Makefile").read_text()
    body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE).group(1)
    found = [line.split() for line in body.splitlines() if line.startswith("\t$(BIN)/python ")]
    assert found
    return [("python", *line[1:]) for line in found]


def made_small(program: str, words: list[str]) -> list[str]:
    """Returns a command's words with `...` filled in, and flags that make it small."""
    if "..." in words:
        at = words.index("...")
        words = [*words[:at], *ELIDED[program], *words[at + 1 :]]
    verb = f"{program} {words[0]}" if f"{program} {words[0]}" in SMALL else program
    small = dict(SMALL.get(verb, {}))
    if verb == "train.py fit" and "--ckpt_path" in words:  # all else is the run's
        run_dir = Path(words[words.index("--config") + 1]).parent
        last = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
        small = {flag: value for flag, value in small.items() if flag.startswith("--trainer.")}
        small["--trainer.max_steps"] = str(last["global_step"] + 1)
    if "configs/quickstart.yaml" in words:
        del small["--data.target"]  # its rows are token ids of the real one
        small["--trainer.limit_train_batches"] = "1"  # an epoch ends, and leaves a best.ckpt
    for flag, value in small.items():
        if flag not in words:
            words = [*words, flag, value]
    if verb == "evaluate.py ablation":
        train_flags = (f"{flag}={value}" for flag, value in SMALL["train.py fit"].items())
        words = [*words, "--", *train_flags]
    return words


def run_program(program: str, words: list[str]) -> None:
    """Runs one of our programs in this process, made small."""
    words = made_small(program, words)
    remove_what_another_page_made(program, words)
    code = 0
    try:
        if program == "train.py":
            trainer = train(words).trainer
            assert words[0] != "fit" or trainer.global_step == trainer.max_steps
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [program, *words])
                importlib.import_module(program.removesuffix(".py")).main()
    except SystemExit as stop:
        code = stop.code or 0
    # one step makes no drafter, and the doctor says so
    assert code == 0 or (code, words[0]) == (1, "doctor"), f"it ends with code {code}"


def remove_what_another_page_made(program: str, words: list[str]) -> None:
    """Removes data under the name that a command writes: it would go on with it."""
    output = Path(wrote(tuple(words)) or "none")
    if "--data.fill_cache" in words:
        output = Path("cache")
    elif not program.startswith("data."):
        return
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    Path(f"{output}.settings.json").unlink(missing_ok=True)


def run_processes(words: list[str]) -> None:
    """Runs a program of ours under torchrun."""
    program = words[words.index("-m") + 1]
    rest = made_small(program, words[words.index("-m") + 2 :])
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    words = [*torchrun, "-m", program, *rest]
    found = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(words, env=found, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def look_at_tensorboard(words: list[str]) -> None:
    """Starts TensorBoard, and asks it which runs there are."""
    from tensorboard import program

    board = program.TensorBoard()
    board.configure([*words, "--port", "0"])
    with urllib.request.urlopen(f"{board.launch()}data/runs", timeout=30) as answer:
        assert isinstance(json.load(answer), list)
