"""Guards B11: after a kill, responses redone, missing, or half-written."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from data.conversations import load_rows
from data.prompt_sets import load_prompts
from data.regenerate import main, regenerate
from drafter.errors import UserError
from drafter.sampling import Sampling
from drafter.target import Target
from tests.runs import forked
from tests.tiny import tiny_target_dir


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regenerate")
    path = tiny_target_dir(folder)
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"Count them {'and so on ' * (i % 5)}{i}."} for i in range(11)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = Target.load(path)
    return folder, path, target, load_prompts(str(prompts), target.tokenizer)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, 20, 0.9)], ids=["greedy", "sampled"]
)
def test_a_run_broken_off_and_resumed_writes_what_an_unbroken_one_writes(
    setting, tmp_path, sampling
):
    _, _, target, prompts = setting
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert regenerate(target, prompts, whole, sampling=sampling, max_new_tokens=8) == 11

    class Stopped(Exception):
        pass

    class Breaking:
        def __init__(self, calls):
            self.calls = calls

        def __getattr__(self, name):
            return getattr(target, name)

        def generate(self, *args, **kwargs):
            self.calls -= 1
            if self.calls < 0:
                raise Stopped
            return target.generate(*args, **kwargs)

    with pytest.raises(Stopped):
        regenerate(Breaking(2), prompts, broken, sampling=sampling, max_new_tokens=8, batch_size=3)
    assert not broken.exists()
    partial = tmp_path / "broken.jsonl.partial"
    assert len(lines(partial)) == 6
    with partial.open("a") as file:
        file.write('{"set": "prompts", "id": 9, "torn')
    made = regenerate(target, prompts, broken, sampling=sampling, max_new_tokens=8, batch_size=4)
    assert made == 5
    assert lines(broken) == lines(whole)
    assert [line["id"] for line in lines(whole)] == list(range(11))
    assert not partial.exists()
    assert regenerate(target, prompts, broken, sampling=sampling, max_new_tokens=8) == 0


def test_a_killed_process_loses_nothing(setting, tmp_path):
    folder, path, _, _ = setting
    out = tmp_path / "out.jsonl.gz"
    words = [
        "--target",
        path,
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--output",
        str(out),
        "--max-new-tokens",
        "100",
        "--batch-size",
        "1",
    ]
    process = forked(main, words, output=tmp_path / "printed")
    partial = tmp_path / "out.jsonl.gz.partial"
    for _ in range(6000):
        if partial.exists() and partial.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not out.exists()
    before = partial.read_bytes()
    main(words)
    assert not partial.exists()
    from data.regenerate import _read

    after = _read(out)
    assert [line["id"] for line in after] == list(range(11))
    kept = [json.loads(line) for line in before.splitlines() if line.endswith(b"}")]
    assert len(kept) >= 2
    assert all(line in after for line in kept)


def test_other_settings_on_the_same_output_are_refused_by_name(setting, tmp_path):
    _, _, target, prompts = setting
    out = tmp_path / "out.jsonl"
    regenerate(target, prompts[:2], out, max_new_tokens=4)
    with pytest.raises(UserError, match="max_new_tokens"):
        regenerate(target, prompts, out, max_new_tokens=5)


def test_greedy_responses_are_the_targets_own(setting, tmp_path):
    _, _, target, prompts = setting
    out = tmp_path / "out.jsonl"
    regenerate(target, prompts, out, max_new_tokens=9)
    expected = target.generate([p.ids for p in prompts], 9)
    assert [line["response_ids"] for line in lines(out)] == [r.ids for r in expected]
    assert [line["finished"] for line in lines(out)] == [r.finished for r in expected]


def test_a_response_is_never_kept_for_a_prompt_that_changed(setting, tmp_path):
    _, _, target, prompts = setting
    out = tmp_path / "out.jsonl"
    regenerate(target, prompts[:3], out, max_new_tokens=4)
    changed = [replace(prompts[0], ids=[*prompts[0].ids, 40]), *prompts[1:3]]
    with pytest.raises(UserError, match="prompt 0 of set 'prompts' was another"):
        regenerate(target, changed, out, max_new_tokens=4)
    # more prompts than before are fine: only the new ones are answered
    assert regenerate(target, prompts, out, max_new_tokens=4) == len(prompts) - 3
    fresh = tmp_path / "fresh.jsonl"
    regenerate(target, prompts, fresh, max_new_tokens=4)
    assert lines(out) == lines(fresh)


def test_a_file_of_something_else_is_not_overwritten(setting, tmp_path):
    _, _, target, prompts = setting
    out = tmp_path / "mine.jsonl"
    out.write_text('{"precious": 1}\n')
    with pytest.raises(UserError, match="was not written by this command"):
        regenerate(target, prompts, out, max_new_tokens=4)
    assert out.read_text() == '{"precious": 1}\n'


def test_a_prompt_without_room_in_the_context_is_one_sentence(setting, tmp_path, capsys):
    folder, path, _, _ = setting
    options = ["--target", path, "--prompts", str(folder / "prompts.jsonl")]
    options += ["--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "500"]
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "more than the target's context of 512" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_responses_are_read_back_as_training_rows_and_as_prompts(setting, tmp_path):
    _, _, target, prompts = setting
    out = tmp_path / "out.jsonl.gz"
    regenerate(target, prompts, out, max_new_tokens=6)
    rows = load_rows(
        str(out), target.tokenizer, vocab_size=target.vocab_size, max_length=64, progress=False
    )
    again = load_prompts(str(out), target.tokenizer)
    assert len(again) == len(prompts)
    for row in rows:
        answered = again[row.sample_id]
        assert answered.ids == prompts[row.sample_id].ids
        assert row.input_ids.tolist() == answered.ids + answered.response_ids
        assert row.input_ids[row.supervised].tolist() == answered.response_ids
