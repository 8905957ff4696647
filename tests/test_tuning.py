"""Guards the tuning runs: what is there is not run again, and none begins without time to end."""

from __future__ import annotations

import json

import pytest
import yaml

from benchmarks import tuning

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
        return {"lengths": lengths, "seconds": 10.0 * row.flags["trainer.max_epochs"]}

    monkeypatch.setattr(tuning, "train", train)
    return names


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
    assert table[0] == "| recipe | seed | best | 0 | 1 | 2 | seconds |"
    assert table[2] == "| short | 0 | 1.500 | 1.000 | 1.500 | 1.300 | 10 |"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_changed_recipe_is_run(tmp_path, trained):
    run(tmp_path)
    grid = yaml.safe_load((tmp_path / "grid.yaml").read_text())
    grid["rows"][0]["flags"]["model.learning_rate"] = 1e-4
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    run(tmp_path)
    assert trained == ["short", "long", "other", "short"]
