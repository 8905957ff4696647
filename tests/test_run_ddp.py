"""Two gloo processes on a CPU: A17 (uneven averaging), E1 (a rank without anchors), E7."""

from __future__ import annotations

import pytest
import torch

from tests.runs import ROOT, cli, cli_process, scalars, weights

DDP = ("--config", str(ROOT / "configs" / "trainer" / "ddp.yaml"))


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_two_processes_train_verify_and_agree_with_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    single = cli(one, data__batch_size=4, verification__max_new_tokens=10)
    done = cli_process(two, extra=DDP, data__batch_size=2, verification__max_new_tokens=10)
    assert done.returncode == 0, done.stderr[-3000:]
    close(weights(two / "run" / "checkpoints" / "last.ckpt"), weights(single))
    alone, both = scalars(one / "run"), scalars(two / "run")
    for tag in ("train/cross_entropy", "train/focal", "train/chain", "val/cross_entropy"):
        assert [step for step, _ in alone[tag]] == [step for step, _ in both[tag]]
        assert [v for _, v in alone[tag]] == pytest.approx([v for _, v in both[tag]], abs=1e-4)
    lengths = [[value for _, value in log["val/accepted_length"]] for log in (alone, both)]
    assert len(lengths[0]) == 3  # before training and after each epoch
    assert lengths[0] == pytest.approx(lengths[1], abs=1e-5)


def test_a_rank_without_valid_anchors_does_not_hang_or_change_the_gradient(tmp_path):
    """Three rows on two ranks: the second step's only row is rank 0's, rank 1 has a filler."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    changes = {"data__limit_rows": 6, "data__val_rows": 1, "trainer__max_epochs": 2}
    single = cli(one, data__batch_size=4, **changes)
    done = cli_process(two, extra=DDP, data__batch_size=2, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    close(weights(two / "run" / "checkpoints" / "last.ckpt"), weights(single))
