"""Prompts of every shape, rendered as the target is served them (C16), in named sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data.prompt_sets import load_prompts
from drafter.errors import UserError
from drafter.evaluation.trajectories import EvalPrompt
from tests.data_templates import GEMMA, QWEN3, assistant, byte_bpe, chatml, user

BENCHMARKS = Path("/work/shared/benchmarks")


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def served(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)[
        "input_ids"
    ]


SHAPES = {
    "turns": ({"turns": ["hello", "and you"]}, ("hello", "and you")),
    "prompt": ({"prompt": "hello", "response": "ignored", "domain": "x"}, ("hello",)),
    "messages": (
        {"messages": [user("hello"), assistant("how"), user("and you"), assistant("42")]},
        ("hello", "and you"),
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hello"}]}, ("hello",)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_prompt_the_target_is_served(tmp_path, shape):
    row, turns = SHAPES[shape]
    tokenizer = chatml()
    (prompt,) = load_prompts(write(tmp_path / "some-set.v2.jsonl.gz", [row]), tokenizer)
    assert isinstance(prompt, EvalPrompt)  # what the verification takes
    assert prompt.ids == served(tokenizer, [user("hello")])
    assert prompt.text == tokenizer.decode(prompt.ids)
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompt.turns == turns
    assert (prompt.set_name, prompt.prompt_id, prompt.response_ids) == ("some-set", 0, None)


def test_tokenised_prompts_need_no_template_and_bring_their_response(tmp_path):
    rows = [{"prompt_ids": [30, 31], "response_ids": [32, 2], "prompt": "hi"}, {"prompt_ids": [30]}]
    tokenizer = byte_bpe(None, eos="<|im_end|>")
    first, second = load_prompts(write(tmp_path / "a.jsonl", rows), tokenizer, vocab_size=400)
    assert (first.ids, first.response_ids, first.turns) == ([30, 31], [32, 2], ("hi",))
    assert (second.ids, second.response_ids, second.turns) == ([30], None, ())
    with pytest.raises(UserError, match=r"line 1: response_ids: token id 32 is outside"):
        load_prompts(str(tmp_path / "a.jsonl"), tokenizer, vocab_size=32)


def test_template_arguments_reach_the_prompt(tmp_path):
    tokenizer = byte_bpe(QWEN3, eos="<|im_end|>")
    source = write(tmp_path / "a.jsonl", [{"prompt": "hello"}])
    (prompt,) = load_prompts(source, tokenizer, template_kwargs={"enable_thinking": False})
    assert prompt.ids == served(tokenizer, [user("hello")], enable_thinking=False)
    assert prompt.ids != load_prompts(source, tokenizer)[0].ids


def test_sets_keep_their_names_and_ids_whatever_is_taken_of_them(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(5)])
    prompts = load_prompts(str(tmp_path), chatml(), skip=1, limit=2)
    expected = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [(p.set_name, p.prompt_id) for p in prompts] == expected
    assert [p.turns[0] for p in prompts] == ["a 1", "a 2", "b 1", "b 2"]
    given = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    assert [p.set_name for p in load_prompts(given, chatml(), limit=1)] == ["b", "a"]


def test_two_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    files = [write(tmp_path / sub / "a.jsonl", [{"prompt": "q"}]) for sub in (".", "x")]
    with pytest.raises(UserError, match="two prompt sets are named 'a'"):
        load_prompts(files, chatml())


def test_long_prompts_are_left_out_and_named(tmp_path, caplog):
    rows = [{"prompt": "q " * length} for length in (1, 40, 2, 50)]
    source = write(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(source, chatml(), max_prompt_tokens=60)
    assert [p.prompt_id for p in prompts] == [0, 2]
    assert "2 of 4 prompts have more than 60 tokens and are left out (rows 1, 3)" in caplog.text
    with pytest.raises(UserError, match="no prompt is left"):
        load_prompts(source, chatml(), max_prompt_tokens=3)


BAD = {
    "missing field": ({"text": "x"}, "line 2: cannot tell what the row holds"),
    "turns is text": ({"turns": "hello"}, "line 2: turns must be a list of texts"),
    "no turn": ({"turns": []}, "line 2: turns must be a list of texts"),
    "no ids": ({"prompt_ids": []}, "line 2: prompt_ids is empty"),
    "answer first": ({"messages": [assistant("x")]}, "line 2: no prompt comes before"),
    "refused": ({"messages": [user("a"), user("b")]}, "line 2: .* refuses it: .* alternate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_prompt_is_named(tmp_path, kind):
    row, message = BAD[kind]
    source = write(tmp_path / "a.jsonl", [{"prompt": "q"}, row])
    with pytest.raises(UserError, match=message):
        load_prompts(source, byte_bpe(GEMMA, eos="<|im_end|>"))


def test_missing_file_missing_template_and_negative_limit(tmp_path):
    with pytest.raises(UserError, match="gsm8k: no such file or folder of prompts"):
        load_prompts("gsm8k", chatml())
    source = write(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match="has no chat template"):
        load_prompts(source, byte_bpe(None, eos="<|im_end|>"))
    with pytest.raises(UserError, match="limit is -1"):
        load_prompts(source, chatml(), limit=-1)


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmark files are not on this machine")
def test_the_six_benchmarks_load():
    tokenizer = chatml()
    prompts = load_prompts(str(BENCHMARKS), tokenizer)
    sizes = {
        name: [p.set_name for p in prompts].count(name) for name in {p.set_name for p in prompts}
    }
    assert sizes == {
        "gsm8k": 256,
        "aime": 30,
        "humaneval": 82,
        "mbpp": 129,
        "livecodebench": 128,
        "mt-bench": 40,
    }
    assert all(len(p.turns) == 2 for p in prompts if p.set_name == "mt-bench")
    last = prompts[-1]
    assert last.ids == served(tokenizer, [user(last.turns[0])])


def test_what_the_user_says_twice_in_a_row_is_one_turn(tmp_path):
    rows = [{"messages": [user("one"), user("two"), assistant("x"), user("three")]}]
    (prompt,) = load_prompts(write(tmp_path / "a.jsonl", rows), chatml())
    assert prompt.turns == ("one\n\ntwo", "three")
    assert prompt.messages == (user("one"), user("two"))
