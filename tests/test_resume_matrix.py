"""Exact resume: stopped anywhere and resumed, a run ends with the same weights, bit for bit.

{1, 2} ranks x {0, 2} workers x {first, later epoch} x {online, cached} x accumulation {1, 4}. Here
a subset in which every pair of values meets; all 32, and kills at random moments, are slow tests.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from data.cache_build import Builder, CacheSettings
from data.sampler import EpochBatches
from drafter.module import DrafterModule
from tests.faults import kill_at
from tests.runs import (
    OVERLAYS,
    ROOT,
    cli,
    cli_fork,
    config,
    find_target,
    same,
    scalars,
    weights,
)

DDP = OVERLAYS["ddp"]
LAYERS = [0, 2]
EPOCHS = 3


class Case(NamedTuple):
    """One setting of the matrix."""

    ranks: int
    workers: int
    epoch: str
    source: str
    accumulate: int

    @property
    def stop(self) -> int:
        """Steps taken when the signal comes: 5 batches an epoch, so 5 steps, or 2 with windows."""
        return {("first", 1): 2, ("first", 4): 0, ("later", 1): 7, ("later", 4): 2}[
            self.epoch, self.accumulate
        ]


ALL = [
    Case(*values)
    for values in itertools.product(
        (1, 2), (0, 2), ("first", "later"), ("online", "cached"), (1, 4)
    )
]
PAIRWISE = [
    Case(1, 0, "first", "online", 1),
    Case(1, 2, "later", "cached", 4),
    Case(2, 0, "later", "online", 4),
    Case(2, 2, "first", "cached", 1),
    Case(1, 2, "first", "online", 4),
    Case(1, 0, "later", "cached", 1),
    Case(1, 2, "later", "online", 1),
    Case(1, 0, "first", "cached", 4),
]  # two of two ranks are enough for every pair, and a run of two ranks takes five times as long


def test_the_subset_holds_every_pair():
    for a, b in itertools.combinations(range(5), 2):
        wanted = set(itertools.product({c[a] for c in ALL}, {c[b] for c in ALL}))
        assert {(c[a], c[b]) for c in PAIRWISE} == wanted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config(folder)
    made = CacheSettings(
        target=str(find_target(folder)),
        train_data=str(folder / "rows.jsonl"),
        val_rows=3,
        max_length=128,
        target_layer_ids=LAYERS,
        dtype="float32",
        shard_gb=40e-6,
        max_new_tokens=12,
        prompts_per_set=3,
    )
    Builder(made, folder / "features", progress=False).run()
    return folder


def run(place: Path, name: str, case: Case, extra=(), check=0):
    """Runs `fit`; returns (exit code, output)."""
    changes = {
        "run_dir": str(place / name),
        "trainer__max_epochs": EPOCHS,
        "trainer__accumulate_grad_batches": case.accumulate,
        "model__target_layer_ids": LAYERS,
        "data__num_workers": case.workers,
        "data__batch_size": 2 // case.ranks,
        "checkpoint_last__every_n_steps": 3,
        "preemption__check_every_n_steps": 1,
    }
    if case.source == "cached":
        changes["data__cache"] = str(place / "features")
    if case.ranks == 1 and not any("SIGKILL" in word for word in extra):
        try:
            cli(place, extra=extra, **changes)
            code, said = 0, ""
        except SystemExit as stop:
            code, said = stop.code, ""
    else:
        overlay = DDP if case.ranks == 2 else ()
        done = cli_fork(place, extra=(*overlay, *extra), ranks=case.ranks, **changes)
        code, said = done.returncode, done.stdout
    assert check is None or code == check, said[-3000:]
    return code, said


def last(place: Path, name: str):
    return weights(place / name / "checkpoints" / "last.ckpt")


@cache
def whole(place: Path, ranks: int, source: str, accumulate: int) -> str:
    """Runs without a stop once for all settings that must equal it; returns the run's name."""
    name = f"whole-{ranks}-{source}-{accumulate}"
    run(place, name, Case(ranks, 0, "first", source, accumulate))
    return name


def check(place: Path, case: Case):
    straight = whole(place, case.ranks, case.source, case.accumulate)
    name = "-".join(map(str, case))
    run(place, name, case, kill_at(case.stop, rank=case.ranks - 1), check=143)
    saved = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < EPOCHS * (5 if case.accumulate == 1 else 2)
    run(place, name, case, ("--ckpt_path", "last"))
    assert same(last(place, name), last(place, straight))
    ours, theirs = scalars(place / name), scalars(place / straight)
    for tag in ("train/cross_entropy", "train/lr", "val/cross_entropy"):
        assert ours[tag] == theirs[tag], tag


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: "-".join(map(str, case)))
def test_stopped_by_sigterm_and_resumed(place, case):
    check(place, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in ALL if c not in PAIRWISE], ids=lambda case: "-".join(map(str, case))
)
def test_stopped_by_sigterm_and_resumed_in_every_setting(place, case):
    check(place, case)


def test_sigkill_costs_the_steps_since_the_last_checkpoint_and_no_more(place):
    case = Case(1, 0, "later", "online", 1)
    straight = whole(place, 1, "online", 1)
    run(place, "killed", case, kill_at(8, "SIGKILL"), check=-signal.SIGKILL)
    saved = torch.load(place / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    run(place, "killed", case, ("--ckpt_path", "last"))
    assert same(last(place, "killed"), last(place, straight))


def same_run(place, name, straight):
    """Asserts equal weights, curves and best checkpoints."""
    assert same(last(place, name), last(place, straight))
    ours, theirs = scalars(place / name), scalars(place / straight)
    for tag in ("train/cross_entropy", "val/cross_entropy", "val/accepted_length"):
        assert ours[tag] == theirs[tag], tag
    best = [
        torch.load(place / run_name / "checkpoints" / "best.ckpt", weights_only=True)
        for run_name in (name, straight)
    ]
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.mark.parametrize(("epoch", "second"), [(0, "SIGTERM"), (0, "SIGKILL"), (2, None)])
def test_killed_in_a_validation_it_is_made_up_for(place, epoch, second):
    """... and then stopped in the next epoch: Lightning alone loses count there."""
    case = Case(1, 0, "later", "online", 1)
    straight, name = whole(place, 1, "online", 1), f"validating-{epoch}-{second}"
    steps = 5 * (epoch + 1)
    run(place, name, case, kill_at(steps, "SIGKILL", validating=True), check=-signal.SIGKILL)
    time.sleep(1.1)  # TensorBoard reads event files in the order of their seconds
    if second:
        later = steps if second == "SIGKILL" else steps + 2  # before anything else is saved
        code = 143 if second == "SIGTERM" else -signal.SIGKILL
        run(place, name, case, ("--ckpt_path", "last", *kill_at(later, second)), check=code)
        time.sleep(1.1)
    run(place, name, case, ("--ckpt_path", "last"))
    same_run(place, name, straight)


def test_the_last_validation_of_a_run_of_so_many_steps_is_made_up_for(place):
    case, limit = Case(1, 0, "later", "online", 1), "--trainer.max_steps=10"
    run(place, "ten", case, (limit,))
    killed = (limit, *kill_at(10, "SIGKILL", validating=True))
    run(place, "ten-killed", case, killed, check=-signal.SIGKILL)
    time.sleep(1.1)
    for _ in range(2):  # the second time there is nothing to make up for
        run(place, "ten-killed", case, (limit, "--ckpt_path", "last"))
    same_run(place, "ten-killed", "ten")


def test_other_sizes_after_a_whole_epoch_lose_no_validation(place, capsys):
    case = Case(1, 0, "first", "online", 1)
    run(place, "whole-epoch", case, kill_at(5, "SIGKILL", validating=True), check=-signal.SIGKILL)
    time.sleep(1.1)
    resumed = ("--ckpt_path", "last", "--data.batch_size=1", "--resume.other_sizes=next_epoch")
    run(place, "whole-epoch", case, resumed)
    assert [step for step, _ in scalars(place / "whole-epoch")["val/cross_entropy"]] == [4, 13, 22]
    assert "is left out" not in capsys.readouterr().err


def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(place, monkeypatch):
    case = Case(1, 0, "later", "online", 1)
    straight = whole(place, 1, "online", 1)
    real, saves = torch.save, []

    def full(content, path, *args, **kwargs):
        saves.append(str(path))
        if len(saves) == 6:
            Path(path).write_bytes(b"torn")
            raise OSError(28, "No space left on device")
        return real(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(place, "full", case)
    folder = place / "full" / "checkpoints"
    assert 0 < torch.load(folder / "last.ckpt", weights_only=True)["global_step"] < 15
    assert not list(folder.glob(".*part"))
    run(place, "full", case, ("--ckpt_path", "last"))
    assert same(last(place, "full"), last(place, straight))
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert any("BestCheckpoint" in name for name in best["callbacks"])


def test_another_batch_size_is_refused_or_goes_on_at_the_next_epoch(place, monkeypatch, capsys):
    case = Case(1, 0, "first", "online", 1)
    run(place, "other", case, kill_at(2), check=143)
    resumed = ("--ckpt_path", "last", "--data.batch_size=1")
    code, _ = run(place, "other", case, resumed, check=None)
    assert code == 2
    assert "--resume.other_sizes next_epoch" in capsys.readouterr().err
    drawn: list[int] = []
    real = DrafterModule.training_step

    def note(self, batch, batch_idx):
        drawn.extend(batch.sample_ids.tolist())
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DrafterModule, "training_step", note)
    run(place, "other", case, (*resumed, "--resume.other_sizes=next_epoch"))
    order = EpochBatches(9, 1, seed=3)
    wanted = []
    for epoch in (1, 2):
        order.set_epoch(epoch)
        wanted += [3 + item.row for batch in order for item in batch]  # 3 rows are held out
    assert drawn == wanted
    end = torch.load(place / "other" / "checkpoints" / "last.ckpt", weights_only=True)
    assert end["global_step"] == 3 + 9 + 9
    rates = dict(scalars(place / "other")["train/lr"])
    assert rates[19] > rates[20] > 0  # the schedule ends where the run does
    assert rates[20] < 0.02 * max(rates.values())

    # stopped and resumed once more, it is that same run
    run(place, "again", case, kill_at(2), check=143)
    say = ("--ckpt_path", "last", "--data.batch_size=1", "--resume.other_sizes=next_epoch")
    run(place, "again", case, (*say, *kill_at(14)), check=143)
    run(place, "again", case, say)
    assert same(last(place, "again"), last(place, "other"))


@pytest.mark.slow
def test_another_world_size_goes_on_at_the_next_epoch(place):
    """One rank, then two with half the batch: the epochs after are those of an unbroken run."""
    one, two = Case(1, 0, "first", "online", 1), Case(2, 0, "first", "online", 1)
    run(place, "grown", one, kill_at(2), check=143)
    code, said = run(place, "grown", two, ("--ckpt_path", "last"), check=None)
    assert code == 2
    assert "world_size 1 -> 2, batch_size 2 -> 1" in said
    run(place, "grown", two, ("--ckpt_path", "last", "--resume.other_sizes=next_epoch"))
    run(place, "alone", one, kill_at(2), check=143)
    words = ("--ckpt_path", "last", "--trainer.accumulate_grad_batches=2", "--data.batch_size=1")
    run(place, "alone", one, (*words, "--resume.other_sizes=next_epoch"))
    grown, alone = last(place, "grown"), last(place, "alone")
    for name in grown:
        torch.testing.assert_close(grown[name], alone[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills_at_random_moments(place, ranks):
    """SIGKILL after a random time, again and again; then the weights of an unbroken run."""
    import subprocess
    import sys

    import yaml

    case = Case(ranks, 2, "later", "cached", 1)
    straight = whole(place, ranks, "cached", 1)
    name = f"random-{ranks}"
    changes = {
        "run_dir": str(place / name),
        "trainer__max_epochs": EPOCHS,
        "model__target_layer_ids": LAYERS,
        "data__num_workers": case.workers,
        "data__batch_size": 2 // ranks,
        "data__cache": str(place / "features"),
        "checkpoint_last__every_n_steps": 1,
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(place, **changes)))
    words = ["fit", "--config", str(path), *(DDP if ranks == 2 else ()), "--ckpt_path", "last"]
    generator = random.Random(ranks)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(generator.uniform(4, 14))
        if process.poll() is None:
            import os

            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(place, name, case, ("--ckpt_path", "last"))
    assert same(last(place, name), last(place, straight))
