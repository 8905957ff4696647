"""Guards the tuning runs: what is there is not run again, and none begins without time to end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from benchmarks import tuning
from benchmarks.curves import scalars

ROWS = [
    {"name": "short", "flags": {"trainer.max_epochs": 1}},
    {"name": "long", "flags": {"trainer.max_epochs": 100}},
    {"name": "other", "flags": {"trainer.max_epochs": 2}},
]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    grid = {"one_budget": False, "rows": ROWS}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    names = []

    def train(row, options, run_dir):
        names.append(row.name)
        lengths = [1.0, 1.5, 1.2 + len(names) / 10]
        if row.name in refused:
            raise SystemExit(refused[row.name])
        seconds = 10.0 * row.flags["trainer.max_epochs"]
        return {"epochs": [0, 1, 2], "lengths": lengths, "seconds": seconds, "resumed": False}

    monkeypatch.setattr(tuning, "train", train)
    return names


refused: dict[str, int] = {}


def test_a_recipe_that_fails_keeps_none_from_being_trained(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setitem(refused, "long", 2)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2
    assert trained == ["short", "long", "other"]
    assert "failed, for reasons given above: grid: long." in capsys.readouterr().err
    monkeypatch.setitem(refused, "long", 143)  # preempted: leave at once
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 143


def test_a_recipe_stopped_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    grid = {"one_budget": False, "rows": ROWS[:1]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    left = []

    def train_row(arguments, run_dir):
        left.append(run_dir.exists())
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if len(left) == 2:
            (run_dir / "checkpoints" / "last.ckpt").touch()
        if len(left) < 3:
            raise SystemExit(143)
        rows = SimpleNamespace(setup=lambda stage: None, train_rows=range(7))
        return SimpleNamespace(datamodule=rows)

    monkeypatch.setattr(tuning, "train_row", train_row)
    monkeypatch.setattr(tuning, "scalars", lambda _: {})
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(tmp_path, "--work", str(tmp_path / "work"))
    run(tmp_path, "--work", str(tmp_path / "work"))
    assert left == [False, False, True]
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["resumed"]
    assert line["rows"] == 7
    # nothing was measured: shown, and left out of the picture
    tuning.main(["show", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "plot.png")])


def run(tmp_path, *more):
    words = ["run", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out.jsonl")]
    tuning.main([*words, *more, "--", "--data.limit_rows", "100"])


def test_none_begins_without_time_to_end_and_none_is_run_again(tmp_path, trained, capsys):
    run(tmp_path, "--budget", "500")
    assert trained == ["short", "other"]
    assert "long] not begun" in capsys.readouterr().out
    run(tmp_path)
    assert trained == ["short", "other", "long"]
    run(tmp_path, "--seed", "1", "--budget", "500")
    assert trained == ["short", "other", "long", "short", "other"]
    lines = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("short", 0),
        ("other", 0),
        ("long", 0),
        ("short", 1),
        ("other", 1),
    ]
    assert all(line["date"] and line["device_name"] for line in lines)


def test_the_table_has_the_longest_first_and_the_plot_is_a_picture(tmp_path, trained, capsys):
    run(tmp_path)
    capsys.readouterr()
    plot = tmp_path / "plot.png"
    tuning.main(["show", str(tmp_path / "out.jsonl"), "--plot", str(plot)])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| recipe | seed | best | epoch 0 | epoch 1 | epoch 2 | seconds |"
    assert table[2] == "| short | 0 | 1.500 | 1.000 | 1.500 | 1.300 | 10 |"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_accepted_length_against_rows(tmp_path, capsys):
    lines = [
        {"grid": "g", "row": name, "seed": 0, "lengths": [1.0, y], "epochs": [0, 1], "seconds": 1.0}
        for name, y in (("few", 1.5), ("many", 2.0))
    ]
    made, plot = tmp_path / "out.jsonl", tmp_path / "plot.png"
    made.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit):
        tuning.main(["show", str(made), "--rows-plot", str(plot)])
    assert "no recipe here says how many rows" in capsys.readouterr().err
    counted = [line | {"rows": 10 * (i + 1)} for i, line in enumerate(lines)]
    made.write_text("".join(json.dumps(line) + "\n" for line in counted))
    tuning.main(["show", str(made), "--rows-plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_changed_recipe_is_run(tmp_path, trained):
    run(tmp_path)
    grid = yaml.safe_load((tmp_path / "grid.yaml").read_text())
    grid["rows"][0]["flags"]["model.learning_rate"] = 1e-4
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    run(tmp_path)
    assert trained == ["short", "long", "other", "short"]


def test_processes_share_a_grid_between_them(tmp_path, trained):
    for which in ("1/2", "2/2"):
        run(tmp_path, "--share", which)
        trained.append("|")
    assert trained == ["short", "other", "|", "long", "|"]


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "2", "a/2", "1/0"])
def test_a_share_that_is_none_is_one_sentence(tmp_path, trained, capsys, share):
    with pytest.raises(SystemExit):
        run(tmp_path, "--share", share)
    assert "such as 2/4" in capsys.readouterr().err


def test_curves_of_two_files_come_in_the_order_that_they_were_written_in(tmp_path):
    for name, steps in (("9", (0, 1)), ("10", (2, 3))):  # read the other way round
        writer = SummaryWriter(str(tmp_path / name))
        for step in steps:
            writer.add_scalar("loss", float(-step), step)
        writer.close()
        (made,) = (tmp_path / name).iterdir()
        made.rename(tmp_path / f"events.out.tfevents.1.host.1.{name}")
    assert scalars(tmp_path) == {"loss": [(step, -step) for step in range(4)]}
