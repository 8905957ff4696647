"""On a GPU the host never waits for the device between logged steps: it prepares the next one."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from data.online import OnlineHiddenStates
from drafter.arriving import Arriving
from drafter.module import DrafterModule
from drafter.target import Target
from tests.tiny import tiny_target_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LOGS_EVERY = 7
STRICT = range(7, 13)
"""Steps done before: the first logged one is over, hooks and all, the next not yet there."""


class RefuseToWait(Callback):
    """In steps between logged ones, an operation that waits for the device is an error."""

    def __init__(self) -> None:
        self.steps = self.recorded = 0

    def on_train_batch_start(self, trainer, *_):
        Asked.step = trainer.global_step
        self.steps += trainer.global_step in STRICT
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step in STRICT else "default")

    def on_train_batch_end(self, trainer, module, *_):
        self.recorded = 0 if module._graphs is None else len(module._graphs)


class Asked(Arriving):
    """Refuses to be read in the step that it comes from: that would wait for the device."""

    step = 0

    def __init__(self, value):
        super().__init__(value)
        self.made = self.step

    def read(self):
        assert self.step > self.made or self.step not in STRICT
        return super().read()


# without `keep_in_memory` transformers asks in every step whether rows are packed, and waits
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_the_host_runs_ahead(tmp_path, monkeypatch, recorded, attention):
    monkeypatch.setattr("drafter.guard.Arriving", Asked)
    monkeypatch.setattr("data.features.Arriving", Asked)
    rows = tmp_path / "rows.jsonl"
    generator = torch.Generator().manual_seed(0)
    with rows.open("w") as file:
        for _ in range(8):
            ids = torch.randint(8, 200, (40,), generator=generator).tolist()
            file.write(json.dumps({"prompt_ids": ids[:8], "response_ids": ids[8:]}) + "\n")
    folder = tiny_target_dir(tmp_path, "llama", head_dim=16)  # flex_attention's least
    datamodule = OnlineHiddenStates(
        target=str(folder),
        train_data=str(rows),
        max_length=64,
        batch_size=2,
        num_anchors=4,
        keep_in_memory="device",
        pad_multiple=64,
    )
    datamodule.use_target(Target.load(str(folder), device="cuda"))
    watcher = RefuseToWait()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=14,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        log_every_n_steps=LOGS_EVERY,
        callbacks=[watcher],
    )
    try:
        module = DrafterModule(num_layers=2, num_taps=2, attention=attention, cuda_graphs=recorded)
        trainer.fit(module, datamodule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watcher.steps == len(STRICT)
    assert set(trainer.progress_bar_metrics) >= {"ce", "tau"}  # which Lightning reads every step
    assert watcher.recorded == recorded
