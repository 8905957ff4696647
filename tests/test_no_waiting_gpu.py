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


class RefuseToWait(Callback):
    """From the seventh step on, an operation that waits for the device is an error."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer, *_):
        Asked.step = trainer.global_step

    def on_train_batch_end(self, trainer, *_):
        self.steps += trainer.global_step >= 6
        torch.cuda.set_sync_debug_mode("error" if 6 <= trainer.global_step < 11 else "default")


class Asked(Arriving):
    """Refuses to be read in the step that it comes from: that would wait for the device."""

    step = 0

    def __init__(self, value):
        super().__init__(value)
        self.made = self.step

    def read(self):
        assert self.step > self.made or not 6 <= self.step < 11
        return super().read()


@pytest.mark.parametrize("keep", ["device", False])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_the_host_runs_ahead(tmp_path, monkeypatch, keep, attention):
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
        keep_in_memory=keep,
    )
    datamodule.use_target(Target.load(str(folder), device="cuda"))
    watcher = RefuseToWait()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        log_every_n_steps=100,
        callbacks=[watcher],
    )
    try:
        trainer.fit(DrafterModule(num_layers=2, num_taps=2, attention=attention), datamodule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watcher.steps == 7
