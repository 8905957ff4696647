"""The feature cache: batches and losses as online, every fault found, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data import cache
from data.cache_build import Builder, CacheSettings
from data.cache_format import (
    MANIFEST,
    CachedRows,
    check_shard,
    kept_positions,
    last_positions,
    read_manifest,
    write_shard,
)
from data.cache_repair import faults
from data.cached import CachedHiddenStates, open_cache
from data.online import OnlineHiddenStates
from data.rows import TokenRow
from data.sampler import shuffled
from drafter.errors import UserError
from drafter.module import DrafterModule
from drafter.target import Target
from tests.runs import cli, config, find_target, forked, joined, weights, write_rows
from tests.tiny import tiny_target_dir

LAYERS = [0, 2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny target, rows, and a finished fp32 cache in several shards."""
    folder = tmp_path_factory.mktemp("cache")
    config(folder)
    build(folder)
    return folder


def settings(folder, **changes):
    given = {
        "target": str(find_target(folder)),
        "train_data": str(folder / "rows.jsonl"),
        "val_rows": 3,
        "max_length": 128,
        "target_layer_ids": LAYERS,
        "dtype": "float32",
        "last_hidden": True,
        "shard_gb": 40e-6,
        "max_new_tokens": 12,
        "prompts_per_set": 3,
    }
    return CacheSettings(**{**given, **changes})


def build(folder, name="made", progress=False, **changes):
    return Builder(settings(folder, **changes), folder / name, progress=progress).run()


def online(folder, **changes):
    given = config(folder)["data"] | changes
    datamodule = OnlineHiddenStates(**given, block_size=4)
    datamodule.setup("fit")
    return datamodule


def cached(folder, name="made", **changes):
    given = {k: config(folder)["data"][k] for k in ("num_anchors", "batch_size")}
    datamodule = CachedHiddenStates(str(folder / name), **given, block_size=4, **changes)
    datamodule.setup("fit")
    return datamodule


def module_for(datamodule):
    torch.manual_seed(0)
    module = DrafterModule(block_size=4, num_layers=1, target_layer_ids=LAYERS)
    module.attach(datamodule.target)
    return module


# ---------------------------------------------------------------- what is read is what was computed


def test_batches_and_losses_are_those_of_the_target(built):
    live, stored = online(built), cached(built)
    module = module_for(live)
    pairs = list(zip(live.train_dataloader(), stored.train_dataloader(), strict=True))
    pairs += list(zip(live.val_dataloader(), stored.val_dataloader(), strict=True))
    assert len(pairs) > 4
    for ours, theirs in pairs:
        ours = live.add_features(ours, tuple(LAYERS))
        for name in ("input_ids", "supervised", "document_ids", "anchors", "sample_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.valid_counts, theirs.valid_counts)
        a, b = (module.loss(module(batch), 0.0).total for batch in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-6)


def test_a_row_keeps_what_a_block_may_see_and_no_more(built):
    manifest = read_manifest(built / "made")
    target = Target.load(str(find_target(built)), dtype="float32")
    rows = CachedRows(built / "made", manifest.part("train"))
    for place in range(len(rows)):
        row = rows[place]
        supervised = np.flatnonzero(row.supervised)
        last_anchor = max(i for i in supervised if i + 1 in set(supervised))
        states, last = rows.hidden_states(place), rows.last_hidden(place)
        assert len(states) == kept_positions(row) == last_anchor
        assert len(last) == last_positions(row) == supervised[-1]
        ids = torch.from_numpy(row.input_ids).long()[None]
        whole = target.features(ids, torch.zeros_like(ids), LAYERS, last_hidden=True)
        assert torch.allclose(states, whole.hidden_states[0, :last_anchor], atol=1e-5)
        assert torch.allclose(last, whole.last_hidden[0, : len(last)], atol=1e-4)


def test_a_run_from_the_cache_trains_the_same_drafter_without_the_target(built, monkeypatch):
    common = {"trainer__max_epochs": 2, "model__target_layer_ids": LAYERS}
    live = cli(built, run_dir=str(built / "live"), **common)
    monkeypatch.setattr(Target, "load", None)  # not even loaded for verification
    stored = cli(
        built,
        run_dir=str(built / "stored"),
        data__cache=str(built / "made"),
        verification__batch_size=32,
        **common,
    )
    ours, theirs = weights(live), weights(stored)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-4), name
    a, b = (run.trainer.callback_metrics["val/accepted_length"] for run in (live, stored))
    assert a == b


def test_what_the_cache_lacks_loads_the_whole_target(built, capsys):
    stored = cached(built).target
    (response,) = stored.generate([[7, 8, 9]], 5)
    assert "[cache] loading the whole target" in capsys.readouterr().out
    whole = Target.load(str(find_target(built)), dtype="float32")
    assert response.ids == whole.generate([[7, 8, 9]], 5)[0].ids
    ids = torch.arange(5, 9)
    assert torch.equal(stored.embed(ids), whole.embed(ids))
    states = torch.randn(3, whole.hidden_size)
    assert torch.equal(stored.head.logits(states), whole.head.logits(states))
    assert stored.eos_token_ids == whole.eos_token_ids
    assert stored.max_length == whole.max_length


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_frozen_parts_of_every_family_are_kept(tmp_path, family):
    """Untied heads, scaled embeddings, soft-capped logits, norms that add one."""
    path = tiny_target_dir(tmp_path, family, tied=family == "gemma3")
    write_rows(tmp_path / "rows.jsonl")
    made = CacheSettings(
        target=path,
        train_data=str(tmp_path / "rows.jsonl"),
        target_layer_ids=LAYERS,
        max_length=128,
    )
    Builder(made, tmp_path / "made", progress=False).run()
    stored = open_cache(tmp_path / "made", "cpu").target
    whole = Target.load(path, dtype="float32")
    ids, states = torch.arange(5, 9), torch.randn(3, whole.hidden_size)
    assert torch.equal(stored.embed(ids), whole.embed(ids))
    assert torch.equal(stored.head.logits(states), whole.head.logits(states))
    ours, theirs = (module_for_target(target).drafter.norm.weight for target in (stored, whole))
    assert torch.allclose(ours, theirs, atol=1e-6)


def module_for_target(target):
    module = DrafterModule(block_size=4, num_layers=1, target_layer_ids=LAYERS)
    module.attach(target)
    return module


def test_the_argmax_share_is_counted(built):
    manifest = read_manifest(built / "made")
    target = Target.load(str(find_target(built)), dtype="float32")
    rows = CachedRows(built / "made", manifest.part("train"))
    equal = scored = 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None]
        logits = target.model(ids).logits[0]
        for i in range(1, len(row.input_ids)):
            if row.supervised[i] and row.supervised[i - 1]:
                scored += 1
                equal += int(logits[i - 1].argmax()) == int(row.input_ids[i])
    parts = manifest.part("train")
    assert (sum(s.argmax_equal for s in parts), sum(s.scored for s in parts)) == (equal, scored)


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("last_hidden", [False, True])
def test_the_estimate_is_within_two_percent(built, last_hidden, capsys):
    name = f"estimate-{last_hidden}"
    builder = Builder(
        settings(built, last_hidden=last_hidden, dtype="bfloat16", shard_gb=60e-6),
        built / name,
        progress=False,
    )
    expected = builder.estimate_bytes(builder.plan())
    builder.run()
    files = [*(built / name).glob("*.safetensors"), built / name / "target" / "frozen.safetensors"]
    real = sum(file.stat().st_size for file in files)
    assert abs(expected - real) <= 0.02 * real
    assert "the cache will take" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_it_is_begun(built, monkeypatch):
    with pytest.raises(UserError, match="more than the budget of"):
        Builder(settings(built), built / "small", budget_gb=1e-6, progress=False).run()
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB free: another folder"):
        build(built, "full")
    assert not list((built / "full").glob("*.safetensors"))


# ---------------------------------------------------------------- damage


def test_every_flipped_bit_is_found_and_its_shard_named(built):
    manifest = build(built, "flipped")
    files = [*(built / "flipped").glob("*.safetensors")]
    files.append(built / "flipped" / "target" / "frozen.safetensors")
    generator = np.random.default_rng(0)
    for _ in range(100):
        file = files[generator.integers(len(files))]
        content = bytearray(file.read_bytes())
        place = int(generator.integers(len(content)))
        content[place] ^= 1 << int(generator.integers(8))
        whole = file.read_bytes()
        file.write_bytes(content)
        assert list(faults(built / "flipped", manifest, progress=False)) == [file.name]
        file.write_bytes(whole)
    assert faults(built / "flipped", manifest, progress=False) == {}


def test_repair_builds_only_what_is_damaged(built, capsys):
    manifest = build(built, "mended")
    folder = built / "mended"
    broken, gone = manifest.shards[1].file, manifest.shards[3].file
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(content[:-7])
    (folder / gone).unlink()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    with pytest.raises(SystemExit):
        cache.main(["verify", str(folder), "--progress=false"])
    printed = capsys.readouterr().out
    assert f"{broken} has {len(content) - 7} of {len(content)} bytes" in printed
    assert f"{gone} is missing" in printed
    cache.main(["repair", str(folder), "--device=cpu", "--progress=false"])
    assert f"built anew: {broken}, {gone}" in capsys.readouterr().out
    cache.main(["verify", str(folder), "--progress=false"])
    assert "every byte is as it was written" in capsys.readouterr().out
    assert (folder / broken).read_bytes() == content
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert {name for name in after if after[name] != before.get(name)} == {broken, gone}


def test_a_damaged_cache_does_not_train(built):
    manifest = build(built, "cut")
    shard = built / "cut" / manifest.shards[0].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"bytes; `python -m data.cache repair"):
        cached(built, "cut")
    shard.unlink()
    with pytest.raises(UserError, match=r"is missing; `python -m data.cache repair"):
        cached(built, "cut")
    shard.write_bytes(content)
    (built / "cut" / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds a half-built cache"):
        cached(built, "cut")
    with pytest.raises(UserError, match="is not a feature cache"):
        cached(built, "nowhere")
    (built / "cut" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        cached(built, "cut")
    (built / "cut" / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="is of format 99"):
        cached(built, "cut")


def test_rows_whose_parts_differ_in_length_are_refused(built, tmp_path):
    manifest = read_manifest(built / "made")
    row = TokenRow(0, np.arange(9, dtype=np.int32), np.arange(9) > 3)
    path = tmp_path / "shard-00000.safetensors"
    for fault, match in (
        (lambda t: {"supervised": t["supervised"][:-1]}, "supervised 8, not 9"),
        (lambda t: {"input_ids": t["input_ids"][:-2]}, "input_ids 7, not 9"),
        (lambda t: {"hidden_states": t["hidden_states"][:-1]}, "hidden_states 6, not 7"),
    ):
        from safetensors.torch import load_file, save_file

        write_shard(path, [row], [torch.randn(7, 8)], None)
        tensors = load_file(path)
        tensors |= fault(tensors)
        save_file(tensors, path)
        said = manifest.shards[0].__class__(
            path.name, "train", 0, 1, 7, 9, path.stat().st_size, "", 0, 0
        )
        assert match in (check_shard(tmp_path, said) or "")


def test_a_state_that_is_not_finite_is_named_while_building(built, monkeypatch):
    real = Target.features

    def spoilt(self, ids, documents, layer_ids, last_hidden=False):
        found = real(self, ids, documents, layer_ids, last_hidden=last_hidden)
        found.hidden_states[0, 4, self.hidden_size + 1] = float("nan")
        return found

    monkeypatch.setattr(Target, "features", spoilt)
    with pytest.raises(UserError, match=r"not finite: row \d+, layer 2, position 4"):
        build(built, "nan")


# ---------------------------------------------------------------- wrong cache


def test_another_targets_cache_is_refused(built, tmp_path):
    other = tiny_target_dir(tmp_path, "llama", seed=5)
    with pytest.raises(UserError, match=r"was built from the target .*, this run names"):
        cached(built, target=other)
    cached(built, target=str(find_target(built)))
    with pytest.raises(UserError, match="with the target in float32, this run asks for"):
        cached(built, target_dtype="bfloat16")


def test_a_target_that_changed_since_is_refused(tmp_path):
    config(tmp_path)
    build(tmp_path)
    (find_target(tmp_path) / "added.txt").write_text("x")
    from drafter.files import file_stamp

    file_stamp.cache_clear()
    with pytest.raises(UserError, match="has changed since the cache"):
        cached(tmp_path)


def test_other_layers_and_a_changed_template_are_refused(built):
    stored = cached(built).target
    module = DrafterModule(block_size=4, num_layers=1, target_layer_ids=[0, 1])
    with pytest.raises(UserError, match=r"layers \[0, 2\], the drafter reads \[0, 1\]"):
        module.attach(stored)
    build(built, "template")
    template = built / "template" / "target" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="built with another chat template"):
        cached(built, "template")


def test_another_build_into_the_same_folder_is_refused(built):
    with pytest.raises(UserError, match=r"settings.max_length: 128 there, 64 asked for"):
        build(built, max_length=64)


# ---------------------------------------------------------------- kills and many processes


def build_process(folder, name, output):
    return forked(build, folder, name, output=output)


def test_killed_while_building_it_goes_on_and_ends_the_same(built, tmp_path):
    name, folder = "killed", built / "killed"
    process = build_process(built, name, tmp_path / "printed")
    while not list(folder.glob("shard-*.json")) and process.is_alive():
        pass
    process.kill()
    process.join()
    done = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
    whole = {f.with_suffix(".safetensors").name for f in folder.glob("shard-*.json")}
    names = [shard.file for shard in read_manifest(built / "made").shards]
    unfinished = next(file for file in reversed(names) if file not in whole)
    (folder / f".{unfinished}.1.part").write_bytes(b"half a shard of a killed process")
    manifest = build(built, name)
    assert {s.sha256 for s in manifest.shards} == {
        s.sha256 for s in read_manifest(built / "made").shards
    }
    for file in whole:
        assert (folder / file).stat().st_mtime_ns == done[file]  # not built again
    assert not list(folder.glob("*.part"))


def test_two_processes_build_one_cache(built, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [build_process(built, "together", output) for output in outputs]
    joined(processes, timeout=120)
    for process, output in zip(processes, outputs, strict=True):
        assert process.exitcode == 0, output.read_text()
    manifest = read_manifest(built / "together")
    assert faults(built / "together", manifest, progress=False) == {}
    assert [s.sha256 for s in manifest.shards] == [
        s.sha256 for s in read_manifest(built / "made").shards
    ]


# ---------------------------------------------------------------- order, workers, command line


def test_workers_read_the_same_batches(built):
    alone, helped = cached(built), cached(built, num_workers=2)
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.hidden_states, b.hidden_states)


def test_rows_keep_to_their_neighbourhood_and_none_is_lost():
    order = shuffled(1000, 10, np.random.default_rng(0))
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, np.arange(1000))
    for at in range(0, 960, 80):  # eight blocks of ten at a time
        assert len({row // 10 for row in order[at : at + 80]}) == 8


def test_the_command_line_takes_a_runs_config_and_says_what_it_made(built, tmp_path, capsys):
    import yaml

    run = config(built, model__target_layer_ids=LAYERS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = str(tmp_path / "made")
    cache.main(["build", "--from", str(tmp_path / "run.yaml"), "--output", out, "--progress=false"])
    printed = capsys.readouterr().out
    assert "layers [0, 2] of 4" in printed
    assert "bfloat16" in printed
    assert "% of the scored tokens are the target's own argmax" in printed
    cache.main(["info", out])
    assert "bytes a token" in capsys.readouterr().out
    identity = read_manifest(Path(out)).identity
    assert identity["settings"]["max_new_tokens"] == run["verification"]["max_new_tokens"]
    assert identity["settings"]["val_rows"] == 3
    with pytest.raises(SystemExit):
        cache.main(["info", str(tmp_path / "nowhere")])
    assert "is not a feature cache" in capsys.readouterr().err
