"""Ablation grids on tiny models: shared work, finished rows, older recipes, one budget."""

from __future__ import annotations

import itertools
import json
import os
import re
import time

import pytest
import yaml

import drafter.evaluation.ablation as ablation_module
import evaluate
from drafter.errors import UserError
from drafter.evaluation.ablation import OLDER, Ablation
from drafter.evaluation.grid_page import grid_page
from drafter.evaluation.recipes import Row, read_grid
from drafter.files import file_stamp
from drafter.target import Target
from tests.runs import ROOT, config, train_parser
from train import list_or_same


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A grid of two recipes on a tiny target, and prompts to measure on."""
    base = tmp_path / "base.yaml"
    settings = config(tmp_path, trainer__max_epochs=1, verification__every_n_epochs=0)
    settings.pop("run_dir")
    settings["data"]["keep_in_memory"] = True
    base.write_text(yaml.safe_dump(settings))
    rows = [{"prompt": f"What is the sum of two and three? {i}"} for i in range(4)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_grid(tmp_path, base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(folder, base, chain=40.0, **more):
    rows = [
        {"name": "uniform", "configs": [str(ROOT / "configs/losses/uniform.yaml")]},
        {
            "name": "+ chain",
            "configs": [str(ROOT / "configs/losses/uniform.yaml")],
            "flags": {"model.loss.alpha_chain": chain},
        },
    ]
    grid = {"base": str(base), "rows": rows, **more}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def run(folder, *extra, seeds=1, overrides=()):
    arguments = ["ablation", "--config", str(folder / "grid.yaml"), "--seeds", str(seeds)]
    arguments += ["--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "12"]
    arguments += ["--cache-dir", str(folder / "cache"), "--no-progress", "--device", "cpu"]
    arguments += ["--output", str(folder / "out"), *extra]
    evaluate.main([*arguments, *(["--", *overrides] if overrides else [])])


def results(folder):
    return json.loads((folder / "out" / "ablation.json").read_text())


def test_a_grid_loads_one_target_and_computes_features_once(place, monkeypatch):
    loads, runs = [], []
    load, features = Target.load.__func__, Target.features
    monkeypatch.setattr(
        Target, "load", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k))
    )
    monkeypatch.setattr(
        Target,
        "features",
        lambda self, ids, *a, **k: runs.append(len(ids)) or features(self, ids, *a, **k),
    )
    run(place, seeds=2)
    assert len(loads) == 1
    # 9 training rows and 3 held-out ones, once for four runs; 4 trajectories, kept too
    assert sum(runs) == 9 + 3 + 4
    (result,) = results(place)
    assert [d["name"] for d in result["drafters"]] == ["uniform", "+ chain"]
    assert [d["runs"] for d in result["drafters"]] == [2, 2]
    assert result["drafters"][0]["figures"]["replay"]["sets"]["prompts"]["responses"] == 8
    assert {(row["a"], row["b"]) for row in result["comparisons"]} == {("+ chain", "uniform")}
    assert "+ chain" in (place / "out" / "ablation.md").read_text()
    assert "<h1>grid</h1>" in (place / "out" / "ablation.html").read_text()
    row = json.loads(next((place / "out" / "rows").glob("chain-*-seed1-*.json")).read_text())
    assert row["settings"]["model"]["loss"]["alpha_chain"] == 40.0
    assert row["settings"]["seed_everything"] == 1
    assert {"revision", "device_name", "train_seconds", "family", "measured_as"} <= row.keys()


def test_rows_that_are_there_are_skipped_and_older_recipes_marked(place, capsys):
    run(place)
    first = results(place)
    capsys.readouterr()
    run(place)
    printed = capsys.readouterr().out
    assert printed.count("is there: ") == 2
    assert "trains in" not in printed
    assert results(place) == first
    write_grid(place, place / "base.yaml", chain=5.0)
    run(place)
    printed = capsys.readouterr().out
    assert printed.count("is there: ") == 1
    assert printed.count("trains in") == 1
    (result,) = results(place)
    names = [d["name"] for d in result["drafters"]]
    assert names[:2] == ["uniform", "+ chain"]
    assert len(names) == 3
    assert names[2].startswith(f"+ chain{OLDER}")
    assert not any(OLDER in row["a"] + row["b"] for row in result["comparisons"])


def test_processes_share_rows_and_the_last_to_finish_makes_the_tables(place, monkeypatch, capsys):
    train = evaluate.train_row

    def beside_another(arguments, run_dir):
        """A second process starts and ends while the first one trains its first row."""
        monkeypatch.setattr(evaluate, "train_row", train)
        capsys.readouterr()
        run(place)
        printed = capsys.readouterr().out
        assert printed.count("trains in") == 1
        assert "uniform, seed 0] is in another process's hands" in printed
        assert "1 rows are left or in other processes' hands" in printed
        assert not (place / "out" / "ablation.json").exists()
        return train(arguments, run_dir)

    monkeypatch.setattr(evaluate, "train_row", beside_another)
    run(place)
    printed = capsys.readouterr().out
    assert printed.count("trains in") == 0  # its own was printed before the other process began
    assert "+ chain, seed 0] is there" in printed
    (result,) = results(place)
    assert [d["name"] for d in result["drafters"]] == ["uniform", "+ chain"]


def test_a_row_that_fails_keeps_no_other_from_running(place, monkeypatch, capsys):
    train = evaluate.train_row

    def fails(arguments, run_dir):
        if any("alpha_chain" in argument for argument in arguments):
            return train(arguments, run_dir)
        raise RuntimeError("this row can't be trained\nand more of it")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "train_row", fails)
        with pytest.raises(SystemExit):
            run(place)
    printed = capsys.readouterr()
    assert "+ chain, seed 0] average accepted length" in printed.out
    said = (
        "1 of the rows failed, the others are kept: grid: uniform, seed 0 (RuntimeError: this row"
    )
    assert said in printed.err
    assert "and more of it. The same" not in printed.err
    assert not (place / "out" / "ablation.json").exists()
    run(place)
    assert capsys.readouterr().out.count("trains in") == 1
    assert len(results(place)[0]["drafters"]) == 2


@pytest.mark.parametrize("wrong", [{"data.val_data": "nowhere.jsonl"}, {"model.no_such_flag": 1}])
def test_a_recipe_that_is_refused_keeps_no_other_from_running(place, capsys, wrong):
    grid = yaml.safe_load((place / "grid.yaml").read_text())
    grid["rows"].insert(0, {"name": "first"})
    grid["rows"][1]["flags"] = wrong
    (place / "grid.yaml").write_text(yaml.safe_dump(grid))
    for _ in range(2):  # the second time what is there comes first
        with pytest.raises(SystemExit):
            run(place)
        assert "1 of the rows failed, the others are kept: grid: uniform" in capsys.readouterr().err
    assert len(list((place / "out" / "rows").iterdir())) == 2


def test_rows_are_measured_afresh_once(place, capsys):
    run(place)
    before = {path: path.stat().st_mtime_ns for path in (place / "out" / "rows").iterdir()}
    run(place, "--fresh")
    printed = capsys.readouterr().out
    assert printed.count("average accepted length: K") == 4
    assert all(path.stat().st_mtime_ns > made for path, made in before.items())
    ablation = Ablation(place / "out", None, None, {}, fresh=True)
    assert not any(map(ablation._is_there, before))
    later = time.time() + 1  # as another process that makes them afresh, too
    os.utime(next(iter(before)), (later, later))
    assert sum(map(ablation._is_there, before)) == 1


def test_a_user_s_mistake_is_told_at_the_first_row(place, monkeypatch, capsys):
    def refuses(arguments, run_dir):
        raise UserError("there is no such file.")

    monkeypatch.setattr(evaluate, "train_row", refuses)
    with pytest.raises(SystemExit):
        run(place)
    printed = capsys.readouterr()
    assert printed.out.count("trains in") == 1
    assert "there is no such file." in printed.err


def test_a_grid_s_page_has_its_rows_their_gain_and_its_plots(place):
    run(place, "--tables", str(place / "pages"), seeds=2)
    page = (place / "pages" / "grid.md").read_text()
    result = json.loads((place / "pages" / "grid.json").read_text())
    base, chain = (
        row["figures"]["replay"]["average"]["accepted_length"]["value"]
        for row in result["drafters"]
    )
    (line,) = [
        line for line in page.splitlines() if line.startswith("| + chain | ") and "%" in line
    ]
    assert line.endswith(f"{100 * (chain / base - 1):+.1f} % |")
    assert f"{chain:.3f}" in line
    assert "2 seeds a row" in page
    assert "| + chain | uniform | " in page  # the paired difference
    lengths = result["drafters"][0]["figures"]["replay"]["by_prompt_length"]
    assert sum(row["prompts"] for row in lengths) == 4
    for picture in re.findall(r"\]\(([^)]+)\)", page):
        assert (place / "pages" / picture).read_bytes().startswith(b"\x89PNG")
    assert page.count("](") == 3
    command = f"    python {result['command']}"
    assert f"{command}\n" in page  # made on a CPU
    assert f"{command}  # GPU\n" in grid_page(result | {"device_name": "a card"})


def test_rows_are_compared_on_the_seeds_that_both_have(place):
    run(place, seeds=2)
    both = results(place)[0]["comparisons"]
    assert {row["runs"] for row in both} == {2}
    rows = place / "out" / "rows"
    next(rows.glob("uniform-*-seed0-*.json")).unlink()
    grid = read_grid(place / "grid.yaml")
    # a row that is not there would be trained by the command; its table is made directly
    ablation = ablation_module.Ablation(
        place / "out",
        train=None,
        measure=None,
        measured_as=json.loads(next(rows.iterdir()).read_text())["measured_as"],
    )
    (result,) = ablation.results([grid], seeds=2)
    assert [row["runs"] for row in result["drafters"]] == [1, 2]
    alone = {row["set"]: row for row in result["comparisons"] if row["figure"] == "accepted_length"}
    assert {row["runs"] for row in alone.values()} == {1}

    def length(name, seed):
        content = json.loads(next(rows.glob(f"{name}-*-seed{seed}-*.json")).read_text())
        (drafter,) = [d for r in content["results"] for d in r["drafters"]]
        return drafter["figures"]["replay"]["average"]["accepted_length"]["value"]

    wanted = length("chain", 1) - length("uniform", 1)
    assert alone["average"]["difference"]["value"] == pytest.approx(wanted)


def test_rows_are_compared_with_those_that_the_grid_names(place):
    write_grid(place, place / "base.yaml")
    grid = yaml.safe_load((place / "grid.yaml").read_text())
    grid["rows"].append({**grid["rows"][1], "name": "again", "flags": {"model.loss.gamma": 3.0}})
    run_pairs = {}
    for name, against in {"default": None, "named": ["uniform"], "late": ["+ chain"]}.items():
        (place / "grid.yaml").write_text(yaml.safe_dump({**grid, "against": against}))
        run(place)
        (result,) = results(place)
        run_pairs[name] = list(dict.fromkeys((c["a"], c["b"]) for c in result["comparisons"]))
    first, second = ("+ chain", "uniform"), ("again", "uniform")
    assert run_pairs["default"] == [first, second, ("again", "+ chain")]
    assert run_pairs["named"] == [first, second]
    # the first two have none of those named before them
    assert run_pairs["late"] == [first, ("again", "+ chain")]
    (place / "grid.yaml").write_text(yaml.safe_dump({**grid, "against": ["no such row"]}))
    with pytest.raises(UserError, match="against must be a list of the grid's rows"):
        read_grid(place / "grid.yaml")


def test_a_table_names_the_rows_machines_and_dates_not_its_own(place):
    run(place)
    for n, path in enumerate(sorted((place / "out" / "rows").glob("*.json"))):
        content = json.loads(path.read_text())
        content |= {"device_name": "a card", "date": f"2026-01-0{n + 1}"}
        path.write_text(json.dumps(content))
    run(place)
    (result,) = results(place)
    assert result["device_name"] == "a card"
    assert result["date"] == "2026-01-01, 2026-01-02"
    assert result["command"]


def test_benchmarks_are_known_by_what_they_hold_not_by_where_they_lie(place, capsys):
    for name in ("here", "there"):
        (place / name).mkdir()
        (place / name / "gsm8k.jsonl").write_text(
            json.dumps({"turns": ["What is 2 and 3?"]}) + "\n"
        )
    extra = ["--benchmarks", "gsm8k"]
    run(place, *extra, "--benchmark-dir", str(place / "here"))
    capsys.readouterr()
    run(place, *extra, "--benchmark-dir", str(place / "there"))
    assert capsys.readouterr().out.count("is there: ") == 2
    (place / "there" / "gsm8k.jsonl").write_text(json.dumps({"turns": ["What is 3 and 4?"]}) + "\n")
    file_stamp.cache_clear()  # as a new process
    run(place, *extra, "--benchmark-dir", str(place / "there"), "--dry-run")
    assert "done" not in capsys.readouterr().out


def test_no_row_is_begun_that_would_not_end_in_time(place, monkeypatch, capsys):
    run(place, "--budget", "0")
    printed = capsys.readouterr().out
    assert "trains in" not in printed
    assert printed.count("not begun: 0 s are left") == 2
    assert "2 rows are left" in printed
    clock = itertools.count(0, 50)  # every look at it is 50 s later
    with monkeypatch.context() as patch:
        patch.setattr(ablation_module.time, "perf_counter", lambda: next(clock))
        run(place, "--budget", "500")
    assert capsys.readouterr().out.count("trains in") == 1
    run(place)
    assert capsys.readouterr().out.count("is there: ") == 1


def killed_before_measuring(place, monkeypatch):
    """Trains the first row, and no more."""

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "report", dies)
        with pytest.raises(KeyboardInterrupt):
            run(place)


def test_a_row_that_was_only_measured_says_nothing_of_how_long_training_takes(
    place, monkeypatch, capsys
):
    killed_before_measuring(place, monkeypatch)
    capsys.readouterr()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ablation_module, "min", lambda paces: seen.append(list(paces)) or 0.0, False)
        run(place, "--budget", "1000", seeds=2)
    assert capsys.readouterr().out.count("trains in") == 3
    assert [len(paces) for paces in seen] == [1, 2]


def test_killed_between_training_and_measuring_it_does_not_train_again(place, monkeypatch, capsys):
    killed_before_measuring(place, monkeypatch)
    assert "trains in" in capsys.readouterr().out
    run(place)
    assert capsys.readouterr().out.count("trains in") == 1  # the other row


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(place, monkeypatch, capsys):
    from drafter.module import DrafterModule

    steps = []
    real = DrafterModule.training_step

    def counted(self, batch, batch_idx):
        steps.append(self.global_step)
        if len(steps) == 8:  # in the second of three epochs of 5 steps
            raise RuntimeError("cut off")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DrafterModule, "training_step", counted)
    epochs = ["--trainer.max_epochs=3"]
    with pytest.raises(SystemExit):
        run(place, overrides=epochs)
    assert "uniform, seed 0 (RuntimeError: cut off)" in capsys.readouterr().err
    del steps[:]
    monkeypatch.setattr(DrafterModule, "training_step", real)
    seen = []
    monkeypatch.setattr(
        DrafterModule,
        "training_step",
        lambda self, batch, i: seen.append(self.global_step) or real(self, batch, i),
    )
    run(place, overrides=epochs)
    assert seen == list(
        range(5, 15)
    )  # on from the first epoch's checkpoint; the other row is there


def test_other_prompts_and_fewer_seeds_are_no_older_recipes(place):
    run(place, seeds=2)
    whole = results(place)
    run(place, "--limit", "2")
    assert [d["name"] for d in results(place)[0]["drafters"]] == ["uniform", "+ chain"]
    assert [d["runs"] for d in results(place)[0]["drafters"]] == [1, 1]
    run(place, seeds=2)
    assert results(place) == whole


def test_two_older_recipes_are_two_rows(place):
    for chain in (5.0, 6.0, 40.0):
        write_grid(place, place / "base.yaml", chain=chain)
        run(place)
    names = [d["name"] for d in results(place)[0]["drafters"]]
    assert len(names) == len(set(names)) == 4
    assert sum(OLDER in name for name in names) == 2


def test_changed_data_and_prompts_are_seen(place, capsys):
    run(place)
    rows = place / "rows.jsonl"
    rows.write_text(rows.read_text().replace("One, two, three.", "One, two, four.."))
    file_stamp.cache_clear()
    capsys.readouterr()
    run(place)
    assert capsys.readouterr().out.count("trains in") == 2
    prompts = place / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("three", "seven"))
    file_stamp.cache_clear()
    run(place)
    printed = capsys.readouterr().out
    assert "trains in" not in printed
    assert "is there" not in printed  # measured on other prompts now
    run(place, "--fresh")
    assert "is there" not in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", "data"])
def test_changed_data_behind_a_preset_is_another_recipe(tmp_path, inside):
    (tmp_path / "copy" / inside).mkdir(parents=True)
    config, found = tmp_path / "a.yaml", set()
    config.write_text(f"data: {{train_data: 'preset:codealpaca={tmp_path / 'copy'}'}}")
    for text in ("one", "two"):
        (tmp_path / "copy" / inside / "train.jsonl").write_text(text)
        file_stamp.cache_clear()
        found.add(Row("x", (str(config),)).family())
    assert len(found) == 2


def test_block_sizes_of_training_against_those_of_inference(place):
    write_grid(place, place / "base.yaml", block_sizes=[2, 4])
    run(place, "--tables", str(place / "pages"), "--temperature", "0.5")
    (result,) = results(place)
    names = [d["name"] for d in result["drafters"]]
    assert names == ["uniform @ K 2", "uniform", "+ chain @ K 2", "+ chain"]
    assert [d["block_size"] for d in result["drafters"]] == [2, 4, 2, 4]
    page = (place / "pages" / "grid-temperature-0.5.md").read_text()
    averages = [
        f"{d['figures']['replay']['average']['accepted_length']['value']:.3f}"
        for d in result["drafters"]
    ]
    assert "| trained | decoded at K 2 | decoded at K 4 |" in page
    assert f"| uniform | {averages[0]} | {averages[1]} |" in page
    assert f"| + chain | {averages[2]} | {averages[3]} |" in page
    pictures = re.findall(r"\]\(([^)]+)\)", page)
    assert len(pictures) == 4
    for picture in pictures:
        assert (place / "pages" / picture).read_bytes().startswith(b"\x89PNG")


def test_flags_after_two_dashes_go_to_every_row(place):
    run(place, overrides=["--model.learning_rate=0.002"])
    for path in (place / "out" / "rows").glob("*.json"):
        assert json.loads(path.read_text())["settings"]["model"]["learning_rate"] == 0.002


def test_a_dry_run_lists_rows_and_trains_none(place, capsys):
    run(place, "--dry-run")
    printed = capsys.readouterr().out
    assert printed.count("to be trained and measured") == 2
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("rows: [{name: a, flags: {trainer.max_epochs: 9}}]", "row 'a' changes trainer.max_epochs"),
        ("rows: [{name: a}, {name: a}]", "two rows are named 'a'"),
        ("rows: [{flags: {}}]", "every row needs a name"),
        ("rows: [{name: a, seeds: 3}]", "fields other than name"),
        ("rows: [{name: a, configs: [nowhere.yaml]}]", "there is no config nowhere.yaml"),
        ("rows: []", "a grid has `base`, `rows`"),
        ("rows: [{name: a, flags: {trainer: {max_steps: 3}}}]", "changes trainer.max_steps"),
        ("rows: [{name: a, flags: {seed_everything: 3}}]", "sets seed_everything, which"),
        ("rows: [{name: a, flags: [x]}]", "flags of row 'a' must be settings"),
        ("{rows: [{name: a}], block_sizes: 8}", "block_sizes must be a list"),
        ("{rows: [{name: a}], block_sizes: [1, 8]}", "block_size is 1"),
        ("- a", "a grid is a mapping"),
        ("rows: [", "is not YAML"),
    ],
)
def test_a_wrong_grid_is_one_sentence(tmp_path, grid, said):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    with pytest.raises(UserError, match=re.escape(said)):
        read_grid(path)
    with pytest.raises(UserError, match="no such grid"):
        read_grid(tmp_path / "none.yaml")


def test_a_budget_may_be_said_to_differ(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("one_budget: false\nrows: [{name: a, flags: {trainer.max_epochs: 9}}]")
    assert read_grid(path).rows[0].flags == {"trainer.max_epochs": 9}


GRIDS = [
    path
    for path in sorted((ROOT / "configs").glob("*/*.yaml"))
    if "rows" in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_row_of_the_shipped_grids_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(path)
    assert len(grid.rows) > 1
    for row in grid.rows:
        parsed = train_parser().parse_args(["fit", *row.arguments(7)]).fit
        assert parsed.seed_everything == 7
        for key, value in row.flags.items():
            assert list_or_same(parsed[key]) == value
