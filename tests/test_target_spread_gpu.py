"""A target spread over two GPUs gives what it gives on one."""

from __future__ import annotations

import pytest
import torch

from drafter.target import Target
from tests.runs import cli, config, find_target
from tests.tiny import tiny_target_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("tied", [True, False])
def test_features_and_responses_are_those_of_one_gpu(tmp_path, tied):
    folder = tiny_target_dir(tmp_path, "llama", tied)
    one = Target.load(folder, device="cuda:0")
    # layers on both, embedding and head on the second: nothing is where the batch is
    parts = {"model.embed_tokens": 1, "model.norm": 1, "lm_head": 1, "model.rotary_emb": 0}
    parts |= {f"model.layers.{i}": i % 2 for i in range(one.num_layers)}
    spread = Target.load(folder, device="cuda:0", device_map=parts)
    assert {p.device.index for p in spread.model.parameters()} == {0, 1}
    assert one.fingerprint == spread.fingerprint
    ids = torch.arange(24, device="cuda:0").view(2, 12) + 3
    for a, b in zip(
        one.features(ids, torch.zeros_like(ids), (0, 1, 2), last_hidden=True),
        spread.features(ids, torch.zeros_like(ids), (0, 1, 2), last_hidden=True),
        strict=True,
    ):
        assert a.device == b.device
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    prompts = [[3, 4, 5], [6, 7], [20, 21, 22, 23]]
    assert [r.ids for r in one.generate(prompts, 12)] == [
        r.ids for r in spread.generate(prompts, 12)
    ]


def test_a_run_trains_and_verifies_with_it(tmp_path):
    config(tmp_path)
    assert find_target(tmp_path)
    gpu = {"trainer__accelerator": "gpu", "trainer__max_epochs": 1}
    run = cli(tmp_path, data__target_device_map="balanced", **gpu)
    assert run.datamodule.target.spread
    assert run.trainer.callback_metrics["val/accepted_length"] >= 1
    cli(tmp_path, "validate", ("--ckpt_path", "last"), data__target_device_map="balanced", **gpu)
