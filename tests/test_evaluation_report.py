"""`evaluate.py report` on tiny models: figures, turns, resuming, merging, mistakes, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluate
from drafter.evaluation.loading import load_drafter
from drafter.evaluation.measure import decode_prompt
from drafter.evaluation.measured_sets import Bench
from drafter.evaluation.plots import plot_result
from drafter.evaluation.results import by_search, merge, read_result
from drafter.evaluation.trajectories import (
    EvalPrompt,
    TrajectorySettings,
    generate_trajectories,
    trajectory_key,
)
from drafter.rounds import count_decoded
from drafter.sampling import Sampling
from drafter.target import Target
from tests.runs import ROOT
from tests.tiny import tiny_target_dir, tiny_tokenizer
from tests.tiny_drafters import overfitted_drafter

QUESTIONS = ["What is the sum of two and three?", "Tell me about the weather.", "Count them."]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target, two drafters in the z-lab layout, and three prompt sets."""
    folder = tmp_path_factory.mktemp("report")
    path = tiny_target_dir(folder)
    target = Target.load(path, dtype="float32")
    tokenizer = tiny_tokenizer()
    prompts = [
        EvalPrompt("x", i, served(tokenizer, [user(f"{QUESTIONS[i % 3]} {i}")])) for i in range(4)
    ]
    for name, steps in (("good", 60), ("poor", 2)):
        overfitted_drafter(target, prompts, steps=steps).save_pretrained(folder / name)
    benchmarks = folder / "benchmarks"
    benchmarks.mkdir()
    write(benchmarks / "one.jsonl", [{"turns": [f"{QUESTIONS[i % 3]} {i}"]} for i in range(5)])
    write(
        benchmarks / "two.jsonl",
        [{"turns": [f"{QUESTIONS[0]} {i}", "And then?"]} for i in range(3)],
    )
    return folder, path


def user(content):
    return {"role": "user", "content": content}


def served(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(place, *extra, drafters=("good",), cache="cache", prompts=None, written=True):
    folder, target = place
    arguments = ["report", "--target", target, "--max-new-tokens", "16", "--no-progress"]
    arguments += ["--cache-dir", str(folder / cache), "--dtype", "float32", "--device", "cpu"]
    for name in drafters:
        arguments += ["--ckpt", str(folder / name)]
    arguments += prompts or ["--benchmark-dir", str(folder / "benchmarks")]
    out = folder / "out" / "r.json"
    evaluate.main([*arguments, "--output", str(out), *extra])
    return read_result(out) if written else None


def rows(result, mode, drafter=0):
    return {
        (row["set_name"], row["prompt_id"], row["turn"]): row
        for row in result["drafters"][drafter]["responses"][mode]
    }


def test_replay_and_the_loop_agree_and_every_figure_is_there(place, capsys):
    result = run(place, "--mode", "both", "--audit", drafters=("good", "poor"))
    assert [d["name"] for d in result["drafters"]] == ["good", "poor", "prompt lookup"]
    for n in range(2):
        replayed, decoded = rows(result, "replay", n), rows(result, "decode", n)
        assert replayed.keys() == decoded.keys()
        assert len(replayed) == 5 + 3 * 2
        for key, row in replayed.items():
            assert row["round_lengths"] == decoded[key]["round_lengths"]
            for name, value in decoded[key]["counts"].items():
                assert row["counts"][name] == pytest.approx(value), name
            assert sum(row["round_lengths"]) == row["response_tokens"] - 1
        figures = [result["drafters"][n]["figures"][mode] for mode in ("replay", "decode")]
        for name, found in figures[0]["sets"]["one"].items():
            if name not in ("waste_ratio_all_anchors", "ms_replay_per_token"):
                assert figures[1]["sets"]["one"][name] == found, name
        assert figures[1]["average"]["tokens_per_second"]["value"] > 0
        assert figures[1]["sets"]["two"]["speedup"]["low"] > 0
        assert {"ms_prefill", "ms_draft", "ms_verify", "ms_bookkeeping"} <= set(
            figures[1]["sets"]["one"]
        )
        assert [row["turn"] for row in figures[0]["by_turn"]] == [1, 2]
        assert figures[0]["by_context"][0]["up_to"] == 1024
    for check in (*result["audit"], *result["agreement"]):
        assert (check["identical"], check["unexplained"]) == (11, 0)
    wanted = {"mode": "replay", "set": "average", "figure": "accepted_length", "b": "poor"}
    (found,) = (row for row in result["comparisons"] if wanted.items() <= row.items())
    assert found["difference"]["value"] > 0
    printed = capsys.readouterr().out
    assert "trajectories: 11 responses" in printed
    assert "good against poor" in printed
    assert "ms per emitted token" in printed


def test_several_searches_are_measured_side_by_side_and_kept_apart(place, monkeypatch, capsys):
    asked = ("--search", "plain", "tree", "self-select", "--budget", "12", "4", "--drafts", "3")
    result = run(place, *asked, "--mode", "both", drafters=("poor",), cache="searches")
    names = ["poor", "poor, tree of 12", "poor, tree of 4", "poor, 3 drafts", "prompt lookup"]
    assert [d["name"] for d in result["drafters"]] == names
    lengths = []
    for n in range(4):
        replayed, decoded = rows(result, "replay", n), rows(result, "decode", n)
        assert len(replayed) == 11
        for key, row in replayed.items():
            assert row["round_lengths"] == decoded[key]["round_lengths"]
            for name, value in decoded[key]["counts"].items():
                assert row["counts"][name] == pytest.approx(value), name
        average = result["drafters"][n]["figures"]["replay"]["average"]
        lengths.append(average["accepted_length"]["value"])
    assert lengths[1] > lengths[0]
    assert lengths[1] >= lengths[2] >= lengths[0]
    assert lengths[3] > lengths[0]
    ways = by_search(result, "replay")["poor"]
    assert {way: len(averages) for way, averages in ways.items()} == {
        "one draft": 1,
        "tree": 2,
        "self-select": 1,
    }
    assert [own["accepted_length"]["value"] for own in ways["tree"]] == [lengths[2], lengths[1]]
    assert "searches" in plot_result(result)
    assert [check["identical"] for check in result["agreement"]] == [11, 11, 11, 11]
    assert [d["search"] for d in result["drafters"]] == [
        None,
        "tree of 12",
        "tree of 4",
        "3 drafts",
        None,
    ]
    assert [d["name"] for d in merge([result, result])["drafters"]] == names
    # none of it is measured again, and none is taken for another
    monkeypatch.setattr(Bench, "_row", None)
    again = run(place, *asked, drafters=("poor",), cache="searches")
    for n in range(4):
        assert rows(again, "replay", n) == rows(result, "replay", n)
    monkeypatch.undo()
    other = run(place, "--search", "tree", "--budget", "1", drafters=("poor",), cache="searches")
    figures = other["drafters"][0]["figures"]["replay"]["average"]
    assert figures["accepted_length"]["value"] <= 2
    assert by_search(other, "replay") == {}  # one size: nothing to draw
    with pytest.raises(SystemExit):
        run(place, *asked, "--audit")
    assert "leave --search out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(place, "--search", "tree", "--budget", "0")
    assert "--budget is 0" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["mine-prompts.jsonl", "mine.json", ".", "elsewhere.jsonl"])
def test_a_users_prompts_are_not_replaced_by_a_report(place, tmp_path, capsys, given):
    for name in ("mine-prompts.jsonl", "mine.json", "elsewhere.jsonl"):
        (tmp_path / name).write_text('{"prompt": "Count them."}\n')
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    output = ["--output", str(tmp_path / "mine.json")]
    with pytest.raises(SystemExit) as stopped:
        run(place, *output, prompts=["--prompts", str(tmp_path / given)], written=False)
    assert stopped.value.code == 2
    assert "would replace" in capsys.readouterr().err
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before


def test_merging_removes_no_file_of_prompts_that_a_user_wrote(place, tmp_path, capsys):
    run(place)
    (tmp_path / "r.json").write_bytes((place[0] / "out" / "r.json").read_bytes())
    mine = tmp_path / "mine-prompts.jsonl"
    mine.write_text('{"prompt": "Count them."}\n')
    words = ["merge", str(tmp_path / "r.json"), "--output", str(tmp_path / "mine.json")]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(words)
    assert stopped.value.code == 2
    assert f"would replace {mine}, which no report has written" in capsys.readouterr().err
    assert mine.read_text() == '{"prompt": "Count them."}\n'
    assert not (tmp_path / "mine.json").exists()
    mine.write_bytes((place[0] / "out" / "r-prompts.jsonl").read_bytes())
    evaluate.main(words)
    assert not mine.exists()  # another report's


def test_the_targets_own_reply_stands_in_the_next_turns_context(place):
    result, path = run(place), place[1]
    target, tokenizer = Target.load(path, dtype="float32"), tiny_tokenizer()
    for i in range(3):
        messages = [user(f"{QUESTIONS[0]} {i}")]
        (reply,) = target.generate([served(tokenizer, messages)], 16)
        messages.append(
            {"role": "assistant", "content": tokenizer.decode(reply.ids, skip_special_tokens=True)}
        )
        messages.append(user("And then?"))
        ids = served(tokenizer, messages)
        row = rows(result, "replay")["two", i, 1]
        assert row["prompt_tokens"] == len(ids)
        assert row["response_tokens"] == len(target.generate([ids], 16)[0].ids)


def test_decoding_alone_asks_the_same_turns(place):
    both = run(place, "--mode", "both")
    alone = run(place, "--mode", "decode", cache="cache-decode")
    strip = ("seconds",)
    for key, row in rows(both, "decode").items():
        other = rows(alone, "decode")[key]
        assert {k: v for k, v in row.items() if k not in strip} == {
            k: v for k, v in other.items() if k not in strip
        }
    # only what stands in a later turn's context was generated
    assert alone["trajectories"]["responses"] == 3


def test_a_second_evaluation_repeats_no_work(place, monkeypatch):
    first = run(place, "--mode", "both")
    from drafter.evaluation import measured_sets

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(Target, "generate", never)
    monkeypatch.setattr(measured_sets, "replay_trajectory", never)
    monkeypatch.setattr(measured_sets, "decode_prompt", never)
    assert run(place, "--mode", "both")["drafters"] == [
        {**drafter, "seconds": dict.fromkeys(drafter["seconds"], 0.0)}
        for drafter in first["drafters"]
    ]
    with pytest.raises(AssertionError, match="measured again"):
        run(place, "--mode", "both", "--fresh")


@pytest.mark.parametrize("mode", ["replay", "decode"])
def test_killed_at_any_measurement_it_ends_with_the_same_numbers(place, monkeypatch, mode):
    """Stopped again and again, started again until it ends; what was finished is not repeated."""
    from drafter.evaluation import measured_sets

    monkeypatch.setattr("drafter.evaluation.measure.FEATURE_BATCH_TOKENS", 60)
    expected = run(place, "--mode", mode, cache=f"whole-{mode}")
    name = {"replay": "replay_trajectory", "decode": "decode_prompt"}[mode]
    real, seen, kills = getattr(measured_sets, name), [], 0

    class Killed(BaseException):
        pass

    budget = [0]

    def counted(*args, **kwargs):
        if budget[0] == 0:
            raise Killed
        budget[0] -= 1
        seen.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(measured_sets, name, counted)
    for _ in range(60):
        budget[0] = 3
        try:
            result = run(place, "--mode", mode, cache=f"torn-{mode}")
            break
        except Killed:
            kills += 1
            for journal in (place[0] / f"torn-{mode}" / "measured").glob("*.jsonl"):
                with journal.open("a") as file:
                    file.write('{"key": "torn')  # the kill came in the middle of a line
    else:
        raise AssertionError("it never ended")
    for key, row in rows(expected, mode).items():
        other = rows(result, mode)[key]
        for name in ("counts", "round_lengths", "accepted_at", "context_rounds"):
            assert row[name] == other[name]
    assert kills >= 3
    # a kill costs no more than the batch (the prompt) that it fell into, and a loop's warm-up
    assert len(seen) <= 11 + 3 * kills + 1
    (journal,) = (place[0] / f"torn-{mode}" / "measured").glob("*.jsonl")
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) == 11


def test_trajectories_survive_a_kill_batch_by_batch(place, monkeypatch):
    real, asked = Target.generate, []

    def dies(self, prompts, *args, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Target, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(place, "--batch-size", "2", cache="torn-trajectories")
    done = list(asked)
    monkeypatch.setattr(Target, "generate", lambda *a, **k: asked.append(0) or real(*a, **k))
    run(place, "--batch-size", "2", cache="torn-trajectories")
    # sets of 5 (3 batches), 3 (2) and the second turns' 3 (2), each generated once
    assert len(done) == 2
    assert len(asked) == 7
    assert len(list((place[0] / "torn-trajectories" / "trajectories").glob("*.json"))) == 7


def test_partial_results_merge_into_what_one_run_gives(place, capsys):
    folder, _ = place
    whole = run(place, drafters=("good", "poor"))
    parts = []
    for n, (names, sets) in enumerate(
        [(("good",), "one"), (("good",), "two"), (("poor",), "one"), (("poor",), "two")]
    ):
        run(
            place,
            drafters=names,
            prompts=["--prompts", str(folder / "benchmarks" / f"{sets}.jsonl")],
        )
        part = folder / f"part{n}.json"
        part.write_text((folder / "out" / "r.json").read_text())
        parts.append(str(part))
    evaluate.main(["merge", *parts, "--output", str(folder / "merged.json")])
    merged = read_result(folder / "merged.json")
    assert [d["figures"] for d in merged["drafters"]] == [d["figures"] for d in whole["drafters"]]
    assert merged["comparisons"] == whole["comparisons"]
    run(place, "--temperature", "1", "--limit", "1")
    with pytest.raises(SystemExit):
        evaluate.main(["merge", parts[0], str(folder / "out" / "r.json"), "--output", "x.json"])
    assert "do not belong together: settings" in capsys.readouterr().err


def test_what_cannot_be_measured_is_named_counted_and_passed_over(place, tmp_path, capsys):
    folder, _ = place
    lines = [
        json.dumps({"turns": ["What is the sum?"]}),
        "{not json",
        json.dumps({"turns": [""]}),
        json.dumps({"turns": ["word " * 600]}),
        json.dumps({"turns": ["Count them.", "again " * 500]}),
        json.dumps({"no": "prompt"}),
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines) + "\n")
    other = tiny_target_dir(tmp_path, "llama", hidden_size=16)
    misfit = overfitted_drafter(Target.load(other), [EvalPrompt("x", 0, [7, 8])], steps=1)
    misfit.save_pretrained(folder / "misfit")
    result = run(place, drafters=("misfit", "good"), prompts=["--prompts", str(file)])
    assert [d["name"] for d in result["drafters"]] == ["good"]
    assert "hidden size 16, not 32" in result["misfits"][0]
    assert sorted(rows(result, "replay")) == [("mixed", 0, 0), ("mixed", 4, 0)]
    reasons = {(row["prompt_id"], row["turn"]): row["reason"] for row in result["skipped"]}
    assert set(reasons) == {(1, 0), (2, 0), (3, 0), (4, 1), (5, 0)}
    assert "line 2: not valid JSON" in reasons[1, 0]
    assert "the prompt is empty" in reasons[2, 0]
    assert "tokens, more than the 496 that fit" in reasons[3, 0]
    assert "tokens, more than the 496 that fit" in reasons[4, 1]
    printed = capsys.readouterr().out
    assert "left out: mixed: 1 x" in printed
    assert "hidden size 16" in printed
    page = (folder / "out" / "r.html").read_text()
    assert "Left out" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 300}, "vocabulary 256, not 300"),
        ({"num_hidden_layers": 6}, "layers 4, not 6"),
    ],
)
def test_no_drafter_that_fits_is_one_sentence(place, tmp_path, capsys, change, said):
    folder, _ = place
    other = tiny_target_dir(tmp_path, "llama", **change)
    prompts = str(ROOT / "assets/showcase.jsonl")
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", str(folder / "good"), "--prompts", prompts, "--target", other])
    error = capsys.readouterr().err
    assert said in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_a_target_without_a_template_measures_what_is_tokenised(place, tmp_path, capsys):
    folder, path = place
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = tmp_path / "bare"
    Target.load(path).model.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    prompts = write(tmp_path / "p.jsonl", [{"turns": ["Count them."]}, {"prompt_ids": [7, 8, 9]}])
    result = run((folder, str(bare)), prompts=["--prompts", prompts])
    assert list(rows(result, "replay")) == [("p", 1, 0)]
    assert "no chat template" in result["skipped"][0]["reason"]
    texts = write(tmp_path / "q.jsonl", [{"turns": ["Count them."]}])
    with pytest.raises(SystemExit):
        run((folder, str(bare)), prompts=["--prompts", texts])
    assert "no chat template" in capsys.readouterr().err


def test_a_dry_run_says_what_is_kept_and_does_nothing(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Target, "generate", None)
        run(place, "--dry-run", "--mode", "both", cache="dry", written=False)
        fresh = capsys.readouterr().out
    assert "0 of 8 first turns are kept, 11 responses to generate" in fresh
    assert "replay: good, 11 responses" in fresh
    assert "decode: 11 responses" in fresh
    assert "MB of disk in all; a guess" in fresh
    assert not list((place[0] / "dry").rglob("*.json*"))
    run(place, cache="dry")
    capsys.readouterr()
    run(place, "--dry-run", cache="dry", written=False)
    kept = capsys.readouterr().out
    assert "8 of 8 first turns are kept, 0 responses to generate" in kept
    assert "replay: good, 3 responses (at most)" in kept  # second turns are known when asked
    assert "a guess" not in kept  # rates were measured


def test_expectations_at_a_temperature_hold_the_loops_mean(place):
    """Replay's exact expectation over 80 seeds' trajectories, against the real loop's rounds."""
    folder, path = place
    target, loaded = Target.load(path, dtype="float32"), load_drafter(str(folder / "good"))
    prompt = EvalPrompt("s", 0, served(tiny_tokenizer(), [user(QUESTIONS[0])]))
    looped, expected = [], []
    for seed in range(80):
        settings = TrajectorySettings(16, Sampling(1.0), seed)
        trajectories = generate_trajectories(target, [prompt], settings, progress=False)
        bench = Bench(target, settings, progress=False)
        expected.append(bench.replay(loaded, trajectories).tallies[0].counts)
        decoded = decode_prompt(loaded.drafter, target, prompt.ids, settings, key=prompt.key)
        looped.append(count_decoded(decoded.rounds, decoded.drafts, decoded.ids))
    for name in ("rounds", "accepted", "emitted"):
        ours = np.array([getattr(counts, name) for counts in looped])
        wanted = np.array([counts[name] for counts in expected])
        error = np.sqrt(ours.var() / len(ours) + wanted.var() / len(wanted))
        assert abs(ours.mean() - wanted.mean()) < 4 * error, name
    assert sum(counts.accepted for counts in looped) > 40  # or the test would see nothing


def test_what_was_measured_before_does_not_depend_on_what_else_was_asked(place, monkeypatch):
    """The drafter is known by its weights as they were read, not as they were cast."""
    from drafter.evaluation import measured_sets

    folder, _ = place
    prompts = ["--prompts", str(folder / "benchmarks" / "one.jsonl")]
    run(place, "--mode", "both", "--dtype", "bfloat16", cache="cast", prompts=prompts)
    monkeypatch.setattr(measured_sets, "decode_prompt", None)
    run(place, "--mode", "decode", "--dtype", "bfloat16", cache="cast", prompts=prompts)


def test_other_end_tokens_are_another_trajectory(place, monkeypatch):
    target = Target.load(place[1], dtype="float32")
    prompts, settings = [EvalPrompt("s", 0, [7, 8])], TrajectorySettings(8)
    before = trajectory_key(target, prompts, settings)
    monkeypatch.setattr(Target, "eos_token_ids", (2, 5))
    assert trajectory_key(target, prompts, settings) != before


def test_sets_of_one_name_are_refused_wherever_they_come_from(place, tmp_path, capsys, monkeypatch):
    folder, _ = place
    rows = [{"problem": "Find m+n."}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    mine = write(tmp_path / "aime.jsonl", [{"turns": ["Count them."]}])
    with pytest.raises(SystemExit):
        run(place, prompts=["--benchmarks", "aime", "--prompts", mine])
    assert "names both a benchmark and a prompt file" in capsys.readouterr().err
    other = write(tmp_path / "average.jsonl", [{"turns": ["Count them."]}])
    with pytest.raises(SystemExit):
        run(place, prompts=["--prompts", other])
    assert "can't be named 'average'" in capsys.readouterr().err
    parts = []
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        file = write(tmp_path / str(n) / "p.jsonl", [{"turns": [f"Count them. {n}"]}])
        run(place, prompts=["--prompts", file])
        parts.append(str(tmp_path / f"{n}.json"))
        (tmp_path / f"{n}.json").write_text((folder / "out" / "r.json").read_text())
    with pytest.raises(SystemExit):
        evaluate.main(["merge", *parts, "--output", str(tmp_path / "m.json")])
    assert "is another prompt in another file" in capsys.readouterr().err


def test_a_hub_set_without_a_usable_prompt_does_not_stop_the_others(place, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: [{"problem": "word " * 900}])
    file = str(place[0] / "benchmarks" / "one.jsonl")
    result = run(place, prompts=["--benchmarks", "aime", "--prompts", file])
    assert {row["set_name"] for row in result["skipped"]} == {"aime"}
    assert {key[0] for key in rows(result, "replay")} == {"one"}


def test_a_checkpoint_that_cannot_be_read_does_not_stop_the_others(place, tmp_path):
    folder, _ = place
    (folder / "broken.ckpt").write_text("not a checkpoint")
    result = run(place, drafters=("broken.ckpt", "good"))
    assert [d["name"] for d in result["drafters"]] == ["good"]
    assert "broken.ckpt is not a checkpoint of a drafter" in result["misfits"][0]


def test_another_block_size_is_another_name(place):
    result = run(place, "--block-size", "3", "--limit", "1")
    assert result["drafters"][0]["name"] == "good @ K 3"
    assert result["drafters"][0]["block_size"] == 3
    assert len(rows(result, "replay")["one", 0, 0]["accepted_at"]) == 2
    assert list(result["overlap"]) == ["good @ K 3"]


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:9"])
def test_a_device_that_is_not_there_is_one_sentence(place, capsys, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        run(place, "--device", device)
    assert f"--device {device}: torch can't use it here" in capsys.readouterr().err
