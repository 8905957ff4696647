"""Faults that a review found where fp32 on one CPU could not show them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from data.online import OnlineHiddenStates
from data.sampler import DraftLoader
from drafter.config import DrafterConfig
from drafter.errors import UserError
from drafter.evaluation.measure import FEATURE_BATCH_TOKENS, FeatureStore
from drafter.evaluation.results import without_nan
from drafter.evaluation.trajectories import (
    EvalPrompt,
    Trajectory,
    TrajectorySettings,
    generate_trajectories,
)
from drafter.model import Drafter
from drafter.sampling import Sampling
from tests.runs import cli, cli_fork, config
from tests.test_sampler_order_and_resume import make_loader
from tests.tiny import tiny_target


def test_angles_stay_fp32_when_the_drafter_is_cast_to_bf16():
    settings = DrafterConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, block_size=4,
        num_target_layers=8, dflash_config={"mask_token_id": 63, "target_layer_ids": [1]},
    )  # fmt: skip
    drafter = Drafter(settings)
    positions = torch.arange(500, 512).unsqueeze(0)
    before = drafter._rope(positions)
    drafter.to(torch.bfloat16)
    assert drafter.fc.weight.dtype == torch.bfloat16
    for now, then in zip(drafter._rope(positions), before, strict=True):
        assert torch.equal(now, then)


def test_the_targets_batches_for_replay_are_bounded_by_their_longest_row(tmp_path, monkeypatch):
    target = tiny_target(tmp_path)
    lengths = [5, 400, 6, 390, 7, 380] * 4
    trajectories = [
        Trajectory(EvalPrompt("s", i, [9] * 3), [9] * (n - 3), [], False)
        for i, n in enumerate(lengths)
    ]
    sizes = []
    real = type(target).features

    def spy(self, input_ids, *args, **kwargs):
        sizes.append(input_ids.numel())
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(target), "features", spy)
    batches = FeatureStore().each(target, trajectories, (0, 2))
    seen = dict(pair for batch in batches for pair in batch)
    assert max(sizes) <= FEATURE_BATCH_TOKENS
    assert {i: states.shape[1] for i, states in seen.items()} == dict(enumerate(lengths))


def test_a_sampled_trajectory_does_not_depend_on_the_other_prompts(tmp_path):
    target = tiny_target(tmp_path)
    prompts = [EvalPrompt(name, i, [7, 8, 9 + i]) for name in ("a", "b") for i in range(3)]
    settings = TrajectorySettings(12, Sampling(temperature=1.0), seed=5)

    def ids(chosen):
        found = generate_trajectories(target, chosen, settings, progress=False)
        return {(t.prompt.set_name, t.prompt.prompt_id): t.ids for t in found}

    whole, shard = ids(prompts), ids(prompts[1::2])
    assert all(whole[key] == value for key, value in shard.items())
    assert whole["a", 0] != whole["b", 0]  # the same words in two sets are drawn apart


def test_the_last_window_ends_where_the_trainer_stops():
    loader: DraftLoader = make_loader(accumulate=4)
    loader.limit = 6
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    counts = batches[4].valid_counts + batches[5].valid_counts
    assert torch.equal(batches[5].window_counts, counts)


def test_features_in_memory_are_filled_row_by_row(tmp_path, monkeypatch):
    settings = config(tmp_path)["data"] | {"keep_in_memory": True}
    datamodule = OnlineHiddenStates(**settings, block_size=4)
    datamodule.setup("fit")
    ran = []
    real = type(datamodule.target).features

    def spy(self, input_ids, *args, **kwargs):
        ran.append(len(input_ids))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(datamodule.target), "features", spy)
    first, second = list(datamodule.train_dataloader())[:2]
    datamodule.add_features(first, (0, 2))
    assert ran == [2]
    mixed = second
    mixed.sample_ids[0] = first.sample_ids[0]  # one known row, one new
    mixed.input_ids[0] = 0
    length = min(mixed.input_ids.shape[1], first.input_ids.shape[1])
    mixed.input_ids[0, :length] = first.input_ids[0, :length]
    datamodule.add_features(mixed, (0, 2))
    assert ran == [2, 1]


def test_last_without_a_checkpoint_starts_again_in_the_same_folder(tmp_path):
    cli(tmp_path, trainer__max_steps=1)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match="starting anew"):
        cli(tmp_path, trainer__max_steps=1, extra=("--ckpt_path", "last"))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not (tmp_path / "run-2").exists()


def test_predict_without_a_checkpoint_is_refused(tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": "Count them."}) + "\n")
    done = cli_fork(tmp_path, "predict", data__predict_prompts=str(rows))
    assert done.returncode == 2
    assert "error: predict needs a trained drafter" in done.stdout
    assert "Traceback" not in done.stdout


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [1.0, math.nan], "b": {"c": math.inf, "d": "x"}}
    assert json.loads(json.dumps(without_nan(value))) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "x"},
    }
    assert issubclass(UserError, ValueError)
