"""A stream kept on disk: kills, other settings (B6), waiting ranks (B17), damage (B10)."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from data import token_file
from data.conversations import load_rows
from data.rows import EMPTY, RowReport, RowTokenizer
from data.sources import SourceRow
from data.token_file import load_or_build, open_tokens
from drafter.errors import UserError
from tests.data_templates import GEMMA, chatml

ROWS = 23
KEY = {"source": "local", "max_length": 64}
fork = multiprocessing.get_context("fork")


def stream(start, stop=ROWS, log=None):
    """Stands in for a hub stream: row 5 has no answer; each row given out is noted in `log`."""
    for i in range(start, stop):
        if log is not None:
            with log.open("a") as file:
                file.write(f"{i}\n")
        response = "" if i == 5 else f"the answer is {i}."
        yield SourceRow(i, f"stream, row {i}", {"prompt": f"question {i}", "response": response})


def build(folder, open_rows=stream, key=KEY, chunk_tokens=200, **kwargs):
    tokenise = RowTokenizer(chatml(), vocab_size=400, max_length=64)
    return load_or_build(
        folder, key, open_rows, tokenise, source="local", chunk_tokens=chunk_tokens, **kwargs
    )


def in_memory():
    """The obvious twin: the same rows without a file."""
    tokenise, report = RowTokenizer(chatml(), vocab_size=400, max_length=64), RowReport("local")
    rows = [tokenise(row, report) for row in stream(0)]
    return [row for row in rows if row is not None], report


def assert_same(found):
    expected, report = in_memory()
    assert len(found) == len(expected) == ROWS - 1
    for row, same in zip(found, expected, strict=True):
        assert row.sample_id == same.sample_id
        assert (row.input_ids.dtype, row.supervised.dtype) == (np.int32, bool)
        assert row.input_ids.tolist() == same.input_ids.tolist()
        assert row.supervised.tolist() == same.supervised.tolist()
    assert found.report == report
    assert found.report.left_out[EMPTY].sample_ids == [5]


def test_the_file_holds_what_memory_would(tmp_path):
    found = build(tmp_path / "t")
    assert len(list((tmp_path / "t").glob("chunk-*.safetensors"))) > 2
    assert_same(found)
    assert found[-1].sample_id == ROWS - 1
    assert [row.sample_id for row in found[4:6]] == [4, 6]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_finished_file_is_opened_without_reading_the_source(tmp_path):
    build(tmp_path / "t")

    def gone(start):
        raise AssertionError("the source was read again")

    assert_same(build(tmp_path / "t", gone))


def test_a_stream_that_breaks_is_taken_up_after_the_last_whole_chunk(tmp_path):
    class Broken(Exception):
        pass

    def breaking(start):
        yield from stream(start, 17)
        raise Broken

    folder = tmp_path / "t"
    with pytest.raises(Broken):
        build(folder, breaking)
    with pytest.raises(UserError, match="no finished token file"):
        open_tokens(folder, KEY)
    log = tmp_path / "log"
    found = build(folder, lambda start: stream(start, log=log))
    read_again = [int(line) for line in log.read_text().split()]
    assert 0 < read_again[0] <= 17  # neither from the start nor past what was lost
    assert read_again == list(range(read_again[0], ROWS))
    assert_same(found)
    assert not list(folder.glob("*.tmp"))


def test_a_chunk_that_vanished_is_written_again_and_none_twice(tmp_path):
    def breaking(start):
        yield from stream(start, 17)
        raise KeyboardInterrupt

    folder = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt):
        build(folder, breaking, chunk_tokens=100)
    (folder / "chunk-00001.safetensors").unlink()
    assert_same(build(folder, chunk_tokens=100))


def test_a_killed_writer_loses_no_row_and_doubles_none(tmp_path):
    folder = tmp_path / "t"

    def slowly(start):
        for row in stream(start):
            time.sleep(0.02)
            yield row

    def writer():
        build(folder, slowly)

    child = fork.Process(target=writer)
    child.start()
    while not (folder / "chunk-00001.safetensors").exists():
        assert child.is_alive()
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not json.loads((folder / "index.json").read_text())["complete"]
    # what a kill between writing aside and renaming leaves
    (folder / "chunk-00002.safetensors.123.tmp").write_bytes(b"half")
    assert_same(build(folder))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("first_dies", [False, True], ids=["finishes", "is killed"])
def test_one_process_writes_and_the_others_wait_for_its_file(tmp_path, monkeypatch, first_dies):
    monkeypatch.setattr(token_file, "POLL_SECONDS", 0.02)
    folder, log = tmp_path / "t", tmp_path / "log"

    def slowly(start):
        for row in stream(start, log=log):
            time.sleep(0.02)
            yield row

    def rank(number):
        rows = build(folder, slowly)
        (tmp_path / f"rank{number}").write_text(str([row.sample_id for row in rows]))

    ranks = [fork.Process(target=rank, args=(number,)) for number in range(3)]
    ranks[0].start()
    while not (folder / "chunk-00000.safetensors").exists():
        time.sleep(0.005)
    for process in ranks[1:]:
        process.start()
    if first_dies:
        time.sleep(0.1)
        os.kill(ranks[0].pid, signal.SIGKILL)
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks[first_dies:]] == [0] * (3 - first_dies)
    read = [int(line) for line in log.read_text().split()]
    if not first_dies:
        assert read == list(range(ROWS))  # by one process, once
    expected = str([i for i in range(ROWS) if i != 5])
    for number in range(1, 3):
        assert (tmp_path / f"rank{number}").read_text() == expected
    assert_same(open_tokens(folder, KEY))


def test_a_mistake_in_the_stream_stops_every_waiting_process(tmp_path):
    def bad(start):
        yield from stream(start, 4)
        yield SourceRow(4, "stream, row 4", {"text": "?"})

    for _ in range(2):  # the lock is free again after the first
        with pytest.raises(UserError, match="stream, row 4: cannot tell"):
            build(tmp_path / "t", bad)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(tmp_path, finished):
    folder = tmp_path / "t"
    if finished:
        build(folder)
    else:
        with pytest.raises(ZeroDivisionError):
            build(folder, lambda start: (1 // 0 for _ in range(3)))
    with pytest.raises(UserError, match="max_length: 64 there, 32 asked for") as caught:
        build(folder, key={**KEY, "max_length": 32})
    assert "source" not in str(caught.value).split("other settings:")[1]


class Asked(Exception):
    """Carries the folder that load_rows asked for."""


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    def note(folder, *args, **kwargs):
        raise Asked(folder)

    monkeypatch.setattr("data.conversations.load_or_build", note)

    def folder_of(source, **change):
        options = {"tokenizer": chatml(), "max_length": 64, "vocab_size": 400, **change}
        with pytest.raises(Asked) as caught:
            load_rows(source, streaming=True, cache_dir=tmp_path, progress=False, **options)
        return caught.value.args[0]

    return folder_of


def test_what_the_tokens_depend_on_changes_the_folder_and_nothing_else_does(tmp_path, folder_of):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    bigger = chatml()
    bigger.add_tokens(["<new>"])
    other_template = chatml()
    other_template.chat_template = GEMMA
    changes = [
        {},
        {"max_length": 65},
        {"tokenizer": bigger},
        {"tokenizer": other_template},
        {"template_kwargs": {"enable_thinking": False}},
        {"eos_token_ids": [9]},
        {"vocab_size": 401},
        {"skip": 1},
        {"limit": 1},
    ]
    folders = [folder_of(str(rows), **change) for change in changes]
    folders += [folder_of("org/name", **change) for change in ({}, {"split": "test"})]
    folders += [folder_of("org/name", revision="abc"), folder_of("org/name:config")]
    used = chatml()  # padding and truncation are settings of a call that some reader made
    used.backend_tokenizer.enable_padding()
    used.backend_tokenizer.enable_truncation(3)
    assert folder_of(str(rows), tokenizer=used) == folders[0]
    rows.write_text('{"prompt": "a", "response": "another"}\n')
    folders.append(folder_of(str(rows)))
    assert len(set(folders)) == len(folders) == 14


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_chunk_is_found_on_opening(tmp_path, damage):
    folder = tmp_path / "t"
    build(folder)
    chunk = folder / "chunk-00001.safetensors"
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-100])
    else:
        chunk.unlink()
    with pytest.raises(UserError, match=r"chunk-00001\.safetensors: \d+ of \d+ bytes are missing"):
        build(folder)


def test_workers_get_the_rows_by_opening_the_files_themselves(tmp_path):
    found = build(tmp_path / "t")
    packed = pickle.dumps(found[0] and found)  # even once a file is open
    assert len(packed) < 2000  # no tokens inside
    assert_same(pickle.loads(packed))


def test_a_chunk_of_rows_left_out_only(tmp_path):
    def empty_beginning(start):
        for i in range(start, 8):
            response = "the answer" if i > 5 else ""
            yield SourceRow(i, f"row {i}", {"prompt": "hello", "response": response})

    found = build(tmp_path / "t", empty_beginning, chunk_seconds=0.0)  # a chunk for each row
    assert [row.sample_id for row in found] == [6, 7]
    assert found.report.left_out[EMPTY].count == 6
    assert len(list((tmp_path / "t").glob("chunk-*.safetensors"))) == 8


def test_streaming_a_local_file_with_skip_and_limit_resumes_at_the_right_row(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"q{i}", "response": f"the answer {i}"}) for i in range(12)]
    rows.write_text("\n".join([*lines[:8], "broken", *lines[8:]]) + "\n")
    options = {"vocab_size": 400, "max_length": 64, "progress": False, "skip": 2, "limit": 9}
    monkeypatch.setitem(load_or_build.__kwdefaults__, "chunk_tokens", 60)
    with pytest.raises(UserError, match="line 9"):
        load_rows(str(rows), chatml(), streaming=True, cache_dir=tmp_path / "c", **options)
    stat = rows.stat()
    (folder,) = (tmp_path / "c").iterdir()
    assert list(folder.glob("chunk-*"))  # so there is something to go on from
    # the same file, mended (same size and time, or it would be another source)
    rows.write_text("\n".join([*lines[:8], " " * 6, *lines[8:]]) + "\n")
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = load_rows(str(rows), chatml(), streaming=True, cache_dir=tmp_path / "c", **options)
    assert [row.sample_id for row in found] == list(range(2, 11))
    direct = load_rows(str(rows), chatml(), **options)
    assert [row.input_ids.tolist() for row in found] == [r.input_ids.tolist() for r in direct]
    assert found.report == direct.report
