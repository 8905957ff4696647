"""Guards responses continued beyond their limit: those that a higher limit would have given."""

from __future__ import annotations

import json

import pytest

from data.lengthen import lengthen, main
from data.prompt_sets import load_prompts
from data.regenerate import regenerate
from drafter.errors import UserError
from drafter.files import file_stamp
from drafter.sampling import Sampling
from drafter.target import Target
from tests.tiny import tiny_target_dir


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengthen")
    path = tiny_target_dir(folder)
    rows = [{"prompt": f"Count them {'and so on ' * (i % 5)}{i}."} for i in range(11)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = Target.load(path)
    return path, target, load_prompts(str(folder / "prompts.jsonl"), target.tokenizer)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_they_are_what_a_higher_limit_gives(setting, tmp_path):
    path, target, prompts = setting
    short, long, whole = (tmp_path / f"{name}.jsonl" for name in ("short", "long", "whole"))
    regenerate(target, prompts, short, max_new_tokens=6)
    regenerate(target, prompts, whole, max_new_tokens=25)
    before, expected = lines(short), lines(whole)
    capped = sum(not line["finished"] for line in before)
    assert capped > 0
    words = ["--target", path, "--responses", str(short), "--max-new-tokens", "25"]
    main([*words, "--output", str(long), "--batch-size", "4"])
    assert lines(long) == expected
    assert {file.name for file in tmp_path.glob("*long*")} == {
        "long.jsonl",
        "long.jsonl.settings.json",
    }
    assert not list(tmp_path.glob(".long*"))


def test_those_that_ended_stay_and_what_else_a_row_holds_is_kept(setting, tmp_path):
    _, target, prompts = setting
    eos = target.eos_token_ids[0]
    rows = [
        {"prompt_ids": prompts[0].ids, "response_ids": [9, eos], "domain": "math"},
        {"prompt_ids": prompts[1].ids, "response_ids": [9, 10], "domain": "code"},
        {"prompt_ids": [9] * (target.max_length - 3), "response_ids": [9, 10, 11]},
        {"prompt_ids": [9] * (target.max_length - 6), "response_ids": [9, 10, 11]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengthen(target, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=8)
    assert found == (2, 1)
    out = lines(tmp_path / "out.jsonl")
    assert out[0] == rows[0]
    assert out[2] == rows[2]
    assert out[1]["domain"] == "code"
    assert out[1]["response_ids"][:2] == [9, 10]
    assert len(out[1]["response_ids"]) == 8 or out[1]["response_ids"][-1] == eos
    assert 3 < len(out[3]["response_ids"]) <= 6


def test_a_run_broken_off_goes_on(setting, tmp_path):
    _, target, prompts = setting
    short = tmp_path / "short.jsonl"
    regenerate(target, prompts, short, max_new_tokens=6)
    lengthen(target, short, tmp_path / "whole.jsonl", max_new_tokens=12)

    class Breaking:
        calls = 0

        def __getattr__(self, name):
            return getattr(target, name)

        def generate(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return target.generate(*args, **kwargs)

    broken = tmp_path / "broken.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lengthen(Breaking(), short, broken, max_new_tokens=12, batch_size=3)
    assert not broken.exists()
    again = Breaking()
    again.calls = 10
    lengthen(again, short, broken, max_new_tokens=12, batch_size=3)
    assert again.calls - 10 < 4  # of the four batches the first was kept
    assert lines(broken) == lines(tmp_path / "whole.jsonl")
    assert lengthen(target, short, broken, max_new_tokens=12) == (0, 0)
    with pytest.raises(UserError, match="was not made of"):
        lengthen(target, short, broken, max_new_tokens=13)


@pytest.mark.parametrize("change", ["limit", "rows"])
def test_what_an_interrupted_run_made_otherwise_is_not_taken(
    setting, tmp_path, monkeypatch, change
):
    _, target, prompts = setting
    eos = target.eos_token_ids[0]
    rows = [{"prompt_ids": prompt.ids, "response_ids": [9, 10]} for prompt in prompts[:4]]
    # with the same room under both limits
    rows.append({"prompt_ids": [9] * (target.max_length - 12), "response_ids": [9, 10]})
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def write():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file_stamp.cache_clear()

    write()
    with monkeypatch.context() as patch:
        patch.setattr("data.lengthen.write_atomic", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lengthen(target, source, output, max_new_tokens=12)
    limit = 30 if change == "limit" else 12
    if change == "rows":
        rows[0]["response_ids"] = [9, eos]
        write()
    lengthen(target, source, output, max_new_tokens=limit)
    clean = tmp_path / "clean.jsonl"
    lengthen(target, source, clean, max_new_tokens=limit)
    assert lines(output) == lines(clean)
    assert change == "limit" or lines(output)[0]["response_ids"] == [9, eos]
    assert not list(tmp_path.glob(".*.more-*"))


def test_what_can_not_be_continued_is_refused(setting, tmp_path):
    _, target, prompts = setting
    sampled = tmp_path / "sampled.jsonl"
    regenerate(target, prompts, sampled, sampling=Sampling(1.0), max_new_tokens=6)
    with pytest.raises(UserError, match="only greedy ones"):
        lengthen(target, sampled, tmp_path / "out.jsonl", max_new_tokens=12)
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(UserError, match=r"text.jsonl.* has no prompt_ids and response_ids"):
        lengthen(target, tmp_path / "text.jsonl", tmp_path / "out.jsonl", max_new_tokens=12)
    greedy = tmp_path / "greedy.jsonl"
    regenerate(target, prompts, greedy, max_new_tokens=6)
    beside = tmp_path / "greedy.jsonl.settings.json"
    made = json.loads(beside.read_text())
    beside.write_text("{")
    with pytest.raises(UserError, match=r"settings.json can't be read"):
        lengthen(target, greedy, tmp_path / "out.jsonl", max_new_tokens=12)
    with pytest.raises(UserError, match="must be at least 1"):
        lengthen(target, greedy, tmp_path / "out.jsonl", max_new_tokens=0)
    with pytest.raises(UserError, match=r"as .jsonl or"):
        lengthen(target, greedy, tmp_path / "out.parquet", max_new_tokens=12)
    beside.write_text(json.dumps({**made, "target": "another"}))
    with pytest.raises(UserError, match="another target's responses"):
        lengthen(target, greedy, tmp_path / "out.jsonl", max_new_tokens=12)
