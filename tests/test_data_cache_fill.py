"""A cache that a run fills in its first epoch is what `build` makes; kills lose nothing."""

from __future__ import annotations

import shutil
import signal
import time

import pytest
import torch

from data import cache
from data.cache_build import Builder, CacheSettings
from data.cache_fill import FILLING, HELD, JOURNAL, read_journals
from data.cache_format import MANIFEST, TRAIN, CachedRows, read_manifest
from data.cache_repair import faults
from data.stored_target import StoredTarget
from drafter.files import lock
from drafter.target import Target
from tests.faults import kill_at
from tests.runs import OVERLAYS, cli, cli_fork, config, find_target, same, scalars, weights

LAYERS = [0, 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    config(folder)
    return folder


def fit(place, name, extra=(), check=0, overlay=None, **changes):
    """A run of three epochs of five steps that fills place/name-features."""
    changes = {
        "run_dir": str(place / name),
        "trainer__max_epochs": 3,
        "model__target_layer_ids": LAYERS,
        "data__cache": str(place / f"{name}-features"),
        "data__fill_cache": True,
        "checkpoint_last__every_n_steps": 2,
        "preemption__check_every_n_steps": 1,
        **changes,
    }
    if overlay is None and "SIGKILL" not in " ".join(extra):
        if check == 0:
            return cli(place, extra=tuple(extra), **changes)
        with pytest.raises(SystemExit) as stop:
            cli(place, extra=tuple(extra), **changes)
        assert stop.value.code == check
        return None
    words = (*(OVERLAYS[overlay] if overlay else ()), *extra)
    done = cli_fork(place, extra=words, ranks=2 if overlay else 1, **changes)
    assert done.returncode == check, done.stdout[-3000:]
    return None


def straight(place):
    """An unbroken run, once for all tests."""
    if not (place / "straight").exists():
        fit(place, "straight")


def last(place, name):
    return weights(place / name / "checkpoints" / "last.ckpt")


def test_the_target_runs_in_the_first_epoch_only_and_the_cache_is_whole(place, monkeypatch):
    rows_run: list[int] = []
    real = Target.features

    def count(self, input_ids, *args, **kwargs):
        rows_run.append(len(input_ids))
        return real(self, input_ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "features", count)
        fit(place, "whole", data__cache_dtype="float32", verification__every_n_epochs=0)
    # 9 training rows once; 3 held-out rows once when the cache is begun and in every epoch
    assert sum(rows_run) == 9 + 3 + 3 * 3 + 3
    folder = place / "whole-features"
    manifest = read_manifest(folder)
    assert not faults(folder, manifest, progress=False)
    assert not [*folder.glob(f"*{FILLING}"), *folder.glob(JOURNAL)]

    settings = CacheSettings(
        target=str(find_target(place)),
        train_data=str(place / "rows.jsonl"),
        val_rows=3,
        max_length=128,
        target_layer_ids=LAYERS,
        dtype="float32",
        max_new_tokens=12,
        prompts_per_set=3,
    )
    built = Builder(settings, place / "built", progress=False).run()
    assert [s.positions for s in built.shards] == [s.positions for s in manifest.shards]
    assert manifest.argmax_share == built.argmax_share
    ours, theirs = (
        CachedRows(place / name, made.part(TRAIN))
        for name, made in (("whole-features", manifest), ("built", built))
    )
    assert len(ours) == len(theirs) == 9
    for i in range(9):
        assert torch.equal(torch.tensor(ours[i].input_ids), torch.tensor(theirs[i].input_ids))
        torch.testing.assert_close(ours.hidden_states(i), theirs.hidden_states(i))

    # online training of the same rows: the same features up to rounding
    online = fit(place, "online", data__cache=None, data__fill_cache=False)
    for name, ours_w in last(place, "whole").items():
        torch.testing.assert_close(ours_w, weights(online)[name], atol=1e-5, rtol=1e-3)


def test_a_run_of_one_epoch_leaves_a_cache_that_others_train_from(place, capsys):
    run = fit(place, "one", trainer__max_epochs=1)
    run.datamodule.setup("fit")  # the same datamodule once more
    assert isinstance(run.datamodule.target, StoredTarget)
    assert isinstance(run.datamodule.train_rows.rows, CachedRows)
    assert (place / "one-features" / MANIFEST).exists()
    capsys.readouterr()
    fit(place, "next", data__cache=str(place / "one-features"), data__fill_cache=False)
    assert "loading the whole target" not in capsys.readouterr().out
    cache.main(["info", str(place / "one-features")])
    assert "9 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "sig"), [(2, "SIGTERM"), (3, "SIGKILL"), (7, "SIGTERM")])
def test_killed_and_resumed_it_is_the_unbroken_run(place, step, sig):
    straight(place)
    name = f"killed-{step}-{sig}"
    fit(place, name, kill_at(step, sig), check=143 if sig == "SIGTERM" else -signal.SIGKILL)
    folder = place / f"{name}-features"
    if step < 5:
        assert not (folder / MANIFEST).exists()
        # every row that a checkpoint has seen is on the disk
        assert len(read_journals(folder)) == {2: 6, 3: 4}[step]
    time.sleep(1.1)  # TensorBoard reads event files in the order of their seconds
    fit(place, name, ("--ckpt_path", "last"))
    assert same(last(place, name), last(place, "straight"))
    assert (
        scalars(place / name)["train/cross_entropy"]
        == scalars(place / "straight")["train/cross_entropy"]
    )
    assert not faults(folder, read_manifest(folder), progress=False)


def test_rows_that_an_epoch_leaves_out_are_filled_by_the_next_run(place):
    fit(place, "part", trainer__max_epochs=1, trainer__limit_train_batches=3)
    folder = place / "part-features"
    assert not (folder / MANIFEST).exists()
    assert len(read_journals(folder)) == 6
    fit(place, "rest", trainer__max_epochs=1, data__cache=str(folder))
    assert not faults(folder, read_manifest(folder), progress=False)


def test_two_processes_fill_one_cache(place):
    fit(place, "two", overlay="ddp", data__batch_size=1)
    folder = place / "two-features"
    manifest = read_manifest(folder)
    assert not faults(folder, manifest, progress=False)
    fit(place, "alone")
    for name, ours in last(place, "two").items():
        torch.testing.assert_close(ours, last(place, "alone")[name], atol=1e-5, rtol=1e-3)


def test_another_runs_half_filled_cache_is_refused(place, capsys):
    fit(place, "first", kill_at(1), check=143)
    fit(
        place,
        "second",
        check=2,
        data__cache=str(place / "first-features"),
        data__cache_dtype="float16",
    )
    assert "holds a cache of other settings" in capsys.readouterr().err


def test_edited_rows_do_not_go_into_a_half_filled_cache(place, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "rows.jsonl").read_text())
    fit(place, "edited", kill_at(3), check=143, data__train_data=str(rows))
    rows.write_text(rows.read_text().replace("3", "4"))
    fit(place, "edited", ("--ckpt_path", "last"), check=2, data__train_data=str(rows))
    assert "holds a cache of other settings (rows.train" in capsys.readouterr().err


def test_a_half_filled_shard_that_is_gone_is_missed(place, capsys):
    fit(place, "gone", kill_at(3), check=143)
    next((place / "gone-features").glob(f"*{FILLING}")).unlink()
    fit(place, "gone", ("--ckpt_path", "last"), check=2)
    assert "was being filled, and its shard-00000.safetensors is gone" in capsys.readouterr().err


def test_a_second_run_is_kept_out_of_the_folder(place, capsys):
    folder = place / "held-features"
    folder.mkdir()
    with lock(folder / HELD) as free:
        assert free
        fit(place, "held", check=2)
    assert "another run is filling the cache" in capsys.readouterr().err
    fit(place, "held")


def test_a_disk_with_room_for_one_cache_is_enough_to_go_on(place, monkeypatch):
    straight(place)
    fit(place, "room", kill_at(3), check=143)
    there = sum(path.stat().st_size for path in (place / "room-features").iterdir())
    left = shutil.disk_usage(place)._replace(free=there // 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: left)
        fit(place, "room", ("--ckpt_path", "last"))
    assert same(last(place, "room"), last(place, "straight"))
