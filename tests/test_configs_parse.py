"""Every shipped YAML parses and says what it is meant to; test_docs.py has the commands shown."""

from __future__ import annotations

import sys

import pytest
import yaml

from tests.runs import ROOT
from train import RUN_DIR_VARIABLE, main

CONFIGS = ROOT / "configs"
BASES = sorted(
    str(path.relative_to(CONFIGS))
    for path in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("targets/*.yaml"))
)
OVERLAYS = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "targets"
    and "rows" not in yaml.safe_load(path.read_text())  # grids: see test_evaluation_ablation.py
)


def printed(arguments, capsys, monkeypatch):
    """Returns the config that `train.py fit ... --print_config` prints."""
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", BASES)
def test_a_shipped_config_parses_and_keeps_the_order_ours(name, capsys, monkeypatch):
    config = printed(["--config", str(ROOT / "configs" / name)], capsys, monkeypatch)
    assert type(config["seed_everything"]) is int
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["run_dir"].startswith("runs/")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_wins_over_the_config_before_it(overlay, capsys, monkeypatch):
    path = ROOT / "configs" / overlay
    base = str(ROOT / "configs" / "smollm2.yaml")
    config = printed(["--config", base, "--config", str(path)], capsys, monkeypatch)

    def check(wanted, got):
        for key, value in wanted.items():
            if isinstance(value, dict):
                check(value, got[key])
            else:
                assert got[key] == value, key

    check(yaml.safe_load(path.read_text()), config)
    assert config["model"]["block_size"] == 16
