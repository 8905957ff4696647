"""Benchmarks by name: rows of the hub's shape give the prompts that are published; overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.benchmarks import BENCHMARKS, benchmark_rows
from data.overlap import find_overlap, training_texts, word_runs
from data.prompt_sets import load_prompt_sets
from drafter.errors import UserError
from tests.data_templates import chatml

SHARED = Path("/work/shared/benchmarks")
HUB_ROWS = {
    "gsm8k": {"question": "How many?", "answer": "#### 4"},
    "aime": {"ID": "2024-I-1", "problem": "Find m+n.", "answer": 7},
    "humaneval": {"task_id": "H/0", "prompt": "def f(x):\n", "canonical_solution": "no"},
    "mbpp": {"task_id": 2, "prompt": "Write a function.", "code": "no"},
    "livecodebench": {
        "question_content": "Sort it.",
        "starter_code": "",
        "public_test_cases": "no",
    },
    "mt-bench": {"prompt": ["Write a post.", "Rewrite it."], "reference": ["no"]},
}


def hub(monkeypatch, rows=HUB_ROWS):
    """Stands in for the hub: one row each; notes what was asked for."""
    asked = []

    def load_dataset(path, config=None, *, split, **options):
        asked.append((path, config, split))
        name = next(n for n, b in BENCHMARKS.items() if (b.path, b.config) == (path, config))
        return [rows[name]] if isinstance(rows[name], dict) else rows[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_every_benchmark_is_asked_for_by_name_and_shows_no_answer(monkeypatch):
    asked = hub(monkeypatch)
    prompts = load_prompt_sets(benchmark_rows(list(BENCHMARKS)), chatml())
    assert [p.set_name for p in prompts] == list(BENCHMARKS)
    assert len(asked) == 6
    assert not any("no" in p.turns or "####" in p.text for p in prompts)
    assert prompts[-1].turns == ("Write a post.", "Rewrite it.")


def test_only_what_is_named_is_fetched(monkeypatch):
    asked = hub(monkeypatch)
    load_prompt_sets(benchmark_rows(["aime"]), chatml())
    assert [path for path, _, _ in asked] == ["HuggingFaceH4/aime_2024"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not on this machine")
@pytest.mark.parametrize("name", [n for n in BENCHMARKS if n != "mt-bench"])
def test_prompts_are_worded_as_the_published_ones(monkeypatch, name):
    """What stands around the question is the same as in the prompts that are on this machine."""
    (question,) = (v for k, v in HUB_ROWS[name].items() if k in KEYS)
    lines = (SHARED / f"{name}.jsonl").read_text().splitlines()
    published = [json.loads(line)["turns"][0] for line in lines]
    frames = []
    for starter in ("", "STARTER"):
        (ours,) = BENCHMARKS[name].turns({**HUB_ROWS[name], "starter_code": starter})
        before, _, after = ours.partition(question)
        frames.append((before, *after.partition("STARTER")[::2]))
    fitting = [
        text
        for text in published
        if any(text.startswith(a) and b in text and text.endswith(c or b) for a, b, c in frames)
    ]
    assert len(fitting) == len(published)


KEYS = ("question", "problem", "prompt", "question_content")


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(UserError, match="no benchmark is named gsm9k; there are gsm8k, aime"):
        benchmark_rows(["gsm9k"])

    def refuses(*args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr("datasets.load_dataset", refuses)
    with pytest.raises(UserError, match=r"aime.*no route to host; without network"):
        load_prompt_sets(benchmark_rows(["aime"]), chatml())


def test_a_row_that_lacks_its_field_is_left_out_and_named(monkeypatch):
    rows = {**HUB_ROWS, "mbpp": [{"code": "x"}, HUB_ROWS["mbpp"]]}
    hub(monkeypatch, rows)
    skipped = []
    prompts = load_prompt_sets(benchmark_rows(["mbpp"]), chatml(), skipped=skipped)
    assert [p.prompt_id for p in prompts] == [1]
    assert "benchmark mbpp, row 0: it lacks what a prompt needs" in skipped[0].reason


# ---------------------------------------------------------------- overlap

FILLER = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def prompts_of(texts, name="s"):
    rows = {name: [(f"row {i}", {"prompt": text}) for i, text in enumerate(texts)]}
    return load_prompt_sets(rows, chatml())


def test_a_prompt_that_was_trained_on_is_found_whatever_its_case_and_commas():
    prompts = prompts_of([f"{FILLER} apples", f"quite another {FILLER[::-1]} thing", "hi there"])
    texts = [f"system user {FILLER.upper().replace(' ', ', ')} APPLES! and then more"]
    found = find_overlap(prompts, texts)["s"]
    assert (found.prompts, found.whole, found.shared) == (3, 1, 1)


def test_instructions_that_every_prompt_has_do_not_count():
    prompts = prompts_of([f"{FILLER} task {chr(97 + i) * 3} alone" for i in range(10)])
    found = find_overlap(prompts, [f"{FILLER} task zzz alone"])["s"]
    assert found.shared == 0
    found = find_overlap(prompts, [f"{FILLER} task bbb alone"])["s"]
    assert (found.whole, found.shared) == (1, 1)


def test_training_rows_are_read_in_every_shape(tmp_path):
    tokenizer = chatml()
    ids = tokenizer(f"{FILLER} apples", add_special_tokens=False)["input_ids"]
    rows = [
        {"prompt": "held out " + FILLER, "response": "x"},
        {"prompt_ids": ids, "response_ids": [5]},
        {"messages": [{"role": "user", "content": "said"}, {"role": "assistant", "content": "so"}]},
        {"nothing": 1},
        {"prompt": "beyond the limit", "response": "x"},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = list(training_texts(str(path), tokenizer, skip=1, limit=4))
    assert len(texts) == 2
    assert FILLER in texts[0]
    assert texts[1] == "said\nso"


def test_runs_are_every_thirteen_words():
    words = [f"w{i}" for i in range(15)]
    assert word_runs(" ".join(words)) == {tuple(words[i : i + 13]) for i in range(3)}
    assert word_runs("too short") == set()
