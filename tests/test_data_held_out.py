"""Held-out prompts must not be trained on, whatever answers them."""

from __future__ import annotations

import re

import pytest

from data.online import OnlineHiddenStates
from data.rows import HELD_OUT_PROMPT
from drafter.errors import UserError
from tests.data_files import load, pair, write_rows
from tests.runs import config


def another(i):
    return {"prompt": f"question {i}", "response": f"or rather {i * i}."}


@pytest.fixture
def files(tmp_path):
    """Two answers to each of five prompts, a file each."""
    first = [{"prompt_ids": [5, 6, i], "response_ids": [7, 8, 9]} for i in range(5)]
    second = [{"prompt_ids": [5, 6, i], "response_ids": [9, 8, 7, i]} for i in range(5)]
    return [
        write_rows(tmp_path / "first.jsonl", first),
        write_rows(tmp_path / "second.jsonl.gz", second),
    ]


def datamodule(tmp_path, files, **options):
    given = config(tmp_path)["data"] | {"train_data": files} | options
    made = OnlineHiddenStates(**given, block_size=4)
    made.setup("fit")
    return made


def test_a_second_answer_to_a_held_out_prompt_is_left_out(tmp_path, files):
    made = datamodule(tmp_path, files, val_rows=2)
    assert [row.sample_id for row in made.val_row_set] == [0, 1]
    assert [row.sample_id for row in made.train_rows] == [2, 3, 4, 7, 8, 9]
    report = made.train_rows.report
    assert report.left_out[HELD_OUT_PROMPT].count == 2
    assert re.search(r"prompt of a held-out row: 2 \(.*second.jsonl.gz, line 1; ", str(report))
    held = {row.prompt for row in made.val_row_set}
    assert not held & {row.prompt for row in made.train_rows}


def test_rows_held_out_by_the_user_leave_nothing_out(tmp_path, files):
    made = datamodule(tmp_path, files, val_data=files[0], val_rows=2)
    assert (len(made.val_row_set), len(made.train_rows)) == (2, 10)


def test_streamed_rows_are_left_out_too_and_kept_apart_on_disk(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [pair(1), pair(2), another(1), another(2)])
    options = {"streaming": True, "cache_dir": tmp_path / "cache"}
    every = load(source, skip=1, **options)
    kept = load(source, skip=1, held_out=load(source, limit=1), **options)
    assert [row.sample_id for row in every] == [1, 2, 3]
    assert [row.sample_id for row in kept] == [1, 3]
    direct = load(source, skip=1, held_out=load(source, limit=1))
    assert [row.sample_id for row in direct] == [1, 3]
    assert str(direct.report) == str(kept.report)


def test_rows_without_a_prompt_are_not_taken_for_answers_to_one(tmp_path):
    rows = [{"prompt_ids": [], "response_ids": [7, 8, i]} for i in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert len(load(source, skip=1, held_out=load(source, limit=1))) == 3


def test_one_prompt_for_all_rows_is_refused_with_the_way_out(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [pair(1), another(1), another(1)])
    with pytest.raises(UserError, match=r"prompt of a held-out row: 2 .*--data.val_data"):
        load(source, skip=1, held_out=load(source, limit=1))
