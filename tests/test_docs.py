"""README and docs: every command parses, every page is reached, every link and figure holds."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from torch.distributed.run import get_args_parser

import data.cache
from drafter.evaluation import options
from drafter.rounds import SlotResults, count_rounds
from tests.documentation import DOCS, PAGES, commands
from tests.runs import ROOT, train_parser

SMOLLM2 = "configs/smollm2.yaml"
ELIDED = {
    "train.py": ["--config", SMOLLM2],
    "data.cache": ["--from", SMOLLM2, "--output", "cache"],
    "data.lengthen": ["--target", "TARGET", "--output", "long.jsonl.gz"],
}
"""What `...` stands for, by program."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        try:
            check(list(command.words))
        except (SystemExit, AssertionError) as error:
            if getattr(error, "code", 1):  # not 0: --help, --print_config
                raise AssertionError(f"{command} does not parse: {error}") from error


@pytest.mark.parametrize(
    "words",
    [
        "python train.py fit --config configs/smollm2.yaml --model.no_such_field 1",
        "python train.py fit --config configs/no-such-file.yaml",
        "python evaluate.py report --no-such-flag",
        "python evaluate.py ablation --config configs/ablation/alone.yaml --output a -- --no.f 1",
        "python -m data.cache build --no_such_flag",
        "python -m drafter.export runs/a",
        "torchrun --nproc-per-node 8 train.py fit ... --no-such-flag 1",
        "make no-such-target",
    ],
)
def test_a_command_that_would_be_refused_does_not_pass(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, AssertionError)) as refused:
        check(words.split())
    assert not isinstance(refused.value, SystemExit) or refused.value.code != 0


def check(words: list[str]) -> None:
    """Has a command parsed by the program that it calls, and run no further.

    Raises:
        SystemExit: It is refused (or asks for no more than to be parsed: code 0).
        AssertionError: Make has no such target, or a file that the repository ought to have is not
            there.
    """
    for word in words:
        if re.match(r"(configs|assets)/.*\w$", word):
            assert (ROOT / word).exists(), f"there is no {word}"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure([str(word) for word in words])
    elif words[0] == "torchrun":
        parsed = get_args_parser().parse_args(["0" if w == "RANK" else w for w in words[1:]])
        check_program(parsed.training_script, parsed.training_script_args)
    elif words[1] == "-m":
        check_program(words[2], words[3:])
    else:
        check_program(words[1], words[2:])


def check_program(program: str, words: list[str]) -> None:
    """Has one of our programs parse its command line."""
    if "..." in words:
        place = words.index("...")
        words = [*words[:place], *ELIDED[program], *words[place + 1 :]]
    if program == "train.py":
        check_train(words)
    elif program == "evaluate.py":
        parsed = options.parse(words)
        if parsed.verb == "ablation":
            check_train(["fit", "--config", SMOLLM2, *parsed.overrides])
    elif program == "data.cache":
        data.cache.parse(words)
    elif program.endswith(".py"):
        assert len(words) == 0
        assert (ROOT / program).is_file()
    else:
        check_main(importlib.import_module(program), words)


def check_train(words: list[str]) -> None:
    """Has train.py parse; a run that a reader will have is one of the shipped recipe."""
    train_parser().parse_args([re.sub(r"^runs/.*\.yaml$", SMOLLM2, word) for word in words])


def check_main(module: ModuleType, words: list[str]) -> None:
    """Has a program that parses in its `main` do so, and run no further."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module.__name__, *words])
        with pytest.raises(Parsed):
            module.main()


def test_every_page_is_reached_from_the_first():
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in body.splitlines() if line and not line.startswith(":")]
            pages = [(page.parent / f"{n}.md").resolve() for n in names if not n.startswith("api/")]
            waiting += [one for one in pages if one not in reached]
    assert reached == set(PAGES) - {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_and_includes_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in link or link.startswith("api/"):  # those pages are made by the build
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        if heading:
            assert heading in headings(target), f"{page.name} links to {link}"
    for path, body in re.findall(r"```\{include\} (\S+)\n(.*?)```", text, re.DOTALL):
        included = (page.parent / path).read_text()
        marks = yaml.safe_load(re.sub(r"^:", "", body, flags=re.MULTILINE))
        for name in ("start-after", "end-before"):
            assert included.count(f"{marks[name]}\n") == 1, f"{page.name}: {name} {marks[name]}"


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, with those of what it includes."""
    text = page.read_text()
    for path in re.findall(r"```\{include\} (\S+)", text):
        text += (page.parent / path).read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def figures(monkeypatch):
    """The scripts of docs/ that draw."""
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("make_idea"), importlib.import_module("make_concepts")


def test_the_figures_are_what_their_scripts_draw(figures, tmp_path, monkeypatch):
    idea, concepts = figures
    concepts.main(tmp_path)
    monkeypatch.setattr(idea, "__file__", str(tmp_path / "make_idea.py"))
    idea.main()
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in DOCS.glob("*.svg")}


def test_the_example_of_rounds_is_counted_as_replay_counts(figures):
    _, concepts = figures
    response, last = concepts.RESPONSE, len(concepts.RESPONSE) - 1
    match = np.zeros((last, concepts.BLOCK_SIZE - 1), bool)
    valid = np.arange(last)[:, None] + np.arange(1, concepts.BLOCK_SIZE) <= last
    for anchor, drafts in concepts.DRAFTS.items():
        for k, word in enumerate(drafts):
            match[anchor, k] = word == response[anchor + 1 + k]
    accept = np.cumprod(match, axis=1).astype(float)
    counts = count_rounds(SlotResults(np.zeros(match.shape, int), match, valid, accept))
    assert [(one.accepted, one.emitted) for one in concepts.rounds()] == list(
        zip(counts.round_accepted, counts.round_lengths, strict=True)
    )
    assert [(total, over) for _, total, over in concepts.figures()] == [
        (counts.emitted, counts.rounds),
        (counts.accepted, counts.rounds),
        (counts.unclipped, counts.rounds),
        (counts.wasted, counts.matched),
    ]


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="`make docs` installs it")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-E", str(DOCS), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Verifies" in (tmp_path / "api/drafter/drafter.verification.html").read_text()
