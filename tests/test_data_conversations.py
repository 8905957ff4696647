"""Rows of any shape and file to token rows, with every row that is left out counted and named."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from data.rows import CUT_AWAY, EMPTY, NO_ANCHOR, REFUSED, UNSUPERVISED
from drafter.errors import UserError
from tests.data_files import load, pair, write_rows
from tests.data_templates import GEMMA, assistant, byte_bpe, chatml, user

KINDS = ("jsonl", "jsonl.gz", "json", "json.gz", "parquet", "parquet.gz")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [pair(i) for i in range(5)]
    found = load(write_rows(tmp_path / f"rows.{kind}", rows))
    expected = load(write_rows(tmp_path / "plain.jsonl", rows))
    assert [r.sample_id for r in found] == [0, 1, 2, 3, 4]
    for row, same in zip(found, expected, strict=True):
        assert row.input_ids.dtype == np.int32
        assert row.supervised.dtype == bool
        assert row.input_ids.tolist() == same.input_ids.tolist()
        assert row.supervised.tolist() == same.supervised.tolist()
    assert "the answer is 3.<|im_end|>" in chatml().decode(found[3].input_ids)


def test_lines_under_the_name_json_and_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    text = f"\ufeff{json.dumps(pair(0))}\n\n{json.dumps(pair(1))}\n"
    path.write_text(text, encoding="utf-8")
    assert [row.sample_id for row in load(str(path))] == [0, 1]


TURNS = [("hello", "how are you?"), ("today", "the answer is 42.")]
SHAPES = {
    "messages": {
        "messages": [m for q, a in TURNS for m in (user(q), assistant(a))],
    },
    "conversation, with fields that are null": {
        "conversation": [
            {**m, "tool_calls": None} for q, a in TURNS for m in (user(q), assistant(a))
        ],
    },
    "sharegpt": {
        "conversations": [
            {"from": speaker, "value": text}
            for q, a in TURNS
            for speaker, text in (("human", q), ("gpt", a))
        ],
    },
    "prompt as messages": {
        "prompt": [user(TURNS[0][0]), assistant(TURNS[0][1]), user(TURNS[1][0])],
        "completion": [assistant(TURNS[1][1])],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_conversation_gives_the_same_tokens(tmp_path, shape):
    tokenizer = chatml()
    row = load(write_rows(tmp_path / "rows.jsonl", [SHAPES[shape]]), tokenizer)[0]
    served = tokenizer.apply_chat_template(SHAPES["messages"]["messages"])["input_ids"]
    assert row.input_ids.tolist() == served
    answers = "".join(f"{answer}<|im_end|>" for _, answer in TURNS)
    assert tokenizer.decode(row.input_ids[row.supervised]) == answers


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "response": "you"},
        {"instruction": "hello", "output": "you"},
        {"question": "hello", "answer": "you", "source": "x", "domain": None},
    ],
    ids=["prompt", "instruction", "question"],
)
def test_prompt_and_response_by_their_usual_names(tmp_path, row):
    tokenizer = chatml()
    found = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    served = tokenizer.apply_chat_template([user("hello"), assistant("you")])["input_ids"]
    assert found.input_ids.tolist() == served


def test_system_field_and_alpaca_input_are_not_lost(tmp_path):
    row = {"system": "Be short.", "instruction": "add", "input": "1 and 2", "output": "it is 3"}
    tokenizer = chatml()
    found = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    messages = [{"role": "system", "content": "Be short."}, user("add\n\n1 and 2")]
    served = tokenizer.apply_chat_template([*messages, assistant("it is 3")])["input_ids"]
    assert found.input_ids.tolist() == served


def test_tokenised_rows_need_neither_datasets_nor_a_chat_template(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now raises
    source = write_rows(
        tmp_path / "rows.jsonl.gz", [{"prompt_ids": [20, 21], "response_ids": [22, 23, 2]}]
    )
    row = load(source, byte_bpe(None, eos="<|im_end|>"))[0]
    assert row.input_ids.tolist() == [20, 21, 22, 23, 2]
    assert row.supervised.tolist() == [False, False, True, True, True]


def test_nothing_after_eos_is_supervised_in_tokenised_rows(tmp_path):
    rows = [{"prompt_ids": [20], "response_ids": [22, 23, 7, 24, 25]}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert load(source)[0].supervised.sum() == 5
    assert load(source, eos_token_ids=[7])[0].supervised.tolist() == [0, 1, 1, 1, 0, 0]


def test_sample_ids_do_not_move_with_skip_limit_or_rows_left_out(tmp_path):
    rows = [pair(i) for i in range(10)]
    rows[4]["response"] = ""
    first = write_rows(tmp_path / "a.jsonl", rows[:6])
    second = write_rows(tmp_path / "b.parquet", rows[6:])
    everything = load([first, second])
    assert [row.sample_id for row in everything] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    part = load([first, second], skip=3, limit=5)
    assert [row.sample_id for row in part] == [3, 5, 6, 7]
    assert part.report.read == 5
    by_id = {row.sample_id: row.input_ids.tolist() for row in everything}
    assert all(by_id[row.sample_id] == row.input_ids.tolist() for row in part)
    assert [row.sample_id for row in load(str(tmp_path))] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_settings_beside_regenerated_responses_are_no_rows(tmp_path):
    write_rows(tmp_path / "out.jsonl", [pair(0)])
    (tmp_path / "out.jsonl.settings.json").write_text('{"seed": 0}')
    assert len(load(str(tmp_path))) == 1


def test_rows_left_out_are_counted_by_reason_and_named(tmp_path):
    rows = [
        pair(0),
        {"prompt": "hello", "response": " \n"},
        {"messages": [user("hello")]},
        {"messages": [user("a"), user("b"), assistant("c")]},
        {"prompt_ids": [20], "response_ids": []},
        {"prompt_ids": [20], "response_ids": [2]},
        {"prompt": "hello " * 20, "response": "how are you"},
        {"prompt": "hello", "response": "how are you " * 20},
        {"messages": [user("a"), assistant(""), user("b"), assistant("the answer")]},
        {"prompt": "without a response"},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    found = load(source, byte_bpe(GEMMA, eos="<|im_end|>"), max_length=40)
    report = found.report
    assert [row.sample_id for row in found] == [0, 7, 8]
    assert {reason: tally.sample_ids for reason, tally in report.left_out.items()} == {
        EMPTY: [1, 4],
        UNSUPERVISED: [2, 9],
        REFUSED: [3],
        NO_ANCHOR: [5],
        CUT_AWAY: [6],
    }
    assert report.cut.sample_ids == [6, 7]
    assert report.truncated == 2
    assert (report.read, report.kept) == (10, 3)
    assert report.tokens == sum(len(row.input_ids) for row in found)
    assert report.supervised_tokens == sum(int(row.supervised.sum()) for row in found)
    text = str(report)
    for said in ("3 of 10 rows kept", "rows.jsonl, line 3", "must alternate", "cut to max_length"):
        assert said in text


def test_a_cut_row_keeps_its_beginning(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "response": "the " * 60}])
    whole = load(source, max_length=None, target_max_length=2048)[0]
    cut = load(source, max_length=50, target_max_length=50)[0]
    assert cut.input_ids.tolist() == whole.input_ids[:50].tolist()
    assert cut.supervised.tolist() == whole.supervised[:50].tolist()
    assert cut.input_ids.base is None  # else the whole row stays in memory


def test_a_set_without_any_anchor_is_an_error_before_training(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "response": ""}] * 7)
    with pytest.raises(UserError, match=r"none of 7 rows .* empty response: 7 \(.*line 1;.*\.\.\."):
        load(source)


def test_prompts_alone_are_an_error_that_says_what_to_do(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "reply": "x"}] * 3)
    with pytest.raises(UserError, match=r"no answer in prompt, reply.*data/regenerate\.py"):
        load(source)


def test_skip_beyond_the_end_is_an_error(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [pair(0)])
    with pytest.raises(UserError, match="no rows"):
        load(source, skip=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_is_read_through_datasets(tmp_path, monkeypatch, streaming):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        rows = datasets.Dataset.from_list([pair(i) for i in range(6)])
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"split": "test", "revision": "abc", "skip": 1, "limit": 4, "cache_dir": tmp_path}
    found = load("org/name:config", streaming=streaming, **options)
    assert [row.sample_id for row in found] == [1, 2, 3, 4]
    assert "question 3" in chatml().decode(found[2].input_ids)
    assert [args for args, _ in asked] == [("org/name", "config")]
    assert asked[0][1]["split"] == "test"
    assert asked[0][1]["revision"] == "abc"
    assert asked[0][1]["streaming"] is streaming
