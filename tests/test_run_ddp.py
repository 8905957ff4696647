"""Two gloo processes on a CPU: A17 (uneven averaging), E1 (a rank without anchors), E7."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from data.sampler import EpochBatches
from tests.faults import kill_at
from tests.runs import OVERLAYS, ROOT, cli, cli_fork, cli_process, config, scalars, weights
from train import RUN_DIR_VARIABLE

DDP = OVERLAYS["ddp"]


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


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_a_rank_without_anchors_or_prompts_keeps_nobody_waiting(tmp_path, overlay):
    """Five rows on two ranks, one held-out prompt: rank 1 has a filler row in each epoch's last
    step, and nothing to verify; stopped in mid-epoch and resumed, with windows of two batches.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    changes = {
        "data__limit_rows": 6,
        "data__val_rows": 1,
        "trainer__max_epochs": 2,
        "trainer__accumulate_grad_batches": 2,
        "preemption__check_every_n_steps": 1,
    }
    single = cli(one, data__batch_size=2, **changes)
    changes["data__batch_size"] = 1
    words = (*OVERLAYS[overlay], *kill_at(2, rank=1))
    done = cli_process(two, extra=words, timeout=60, **changes)  # Lightning starts the other rank
    assert done.returncode == 143, done.stderr[-3000:]
    words = (*OVERLAYS[overlay], "--ckpt_path", "last")
    done = cli_fork(two, extra=words, ranks=2, **changes)
    assert done.returncode == 0, done.stdout[-3000:]
    close(weights(two / "run" / "checkpoints" / "last.ckpt"), weights(single))


def test_the_longest_row_visits_every_rank_and_none_has_more_rows_than_another():
    seen = set()
    for epoch in range(30):
        for rank in range(4):
            # dealt by length, as a run does
            batches = EpochBatches(
                41, 2, rank=rank, world_size=4, tokens=lambda row: 9 + (row == 7)
            )
            batches.set_epoch(epoch)
            items = [item for batch in batches for item in batch if item.scored]
            assert len(items) in (10, 11)
            if any(item.row == 7 for item in items):
                seen.add(rank)
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_two_nodes_under_torchrun_are_two_ranks(tmp_path, overlay):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    single = cli(one, data__batch_size=4)
    path = two / "run.yaml"
    path.write_text(yaml.safe_dump(config(two, data__batch_size=2)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    words += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    run = ["train.py", "fit", f"--config={path}", *OVERLAYS[overlay]]
    run += ["--trainer.devices=1", "--trainer.num_nodes=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop(RUN_DIR_VARIABLE, None)
    nodes = [
        subprocess.Popen([*words, f"--node-rank={node}", *run], cwd=ROOT, env=environment)
        for node in range(2)
    ]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    close(weights(two / "run" / "checkpoints" / "last.ckpt"), weights(single))
