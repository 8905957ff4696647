"""Guards model.cuda_graphs on a GPU: real recordings against steps kernel by kernel."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from data.online import OnlineHiddenStates
from drafter.module import DrafterModule
from drafter.target import Target
from tests.tiny import tiny_target_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Watch(Callback):
    """Keeps losses and how many shapes were recorded."""

    def __init__(self):
        self.losses, self.norms, self.shapes = [], [], 0

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))
        self.norms.append(float(trainer.callback_metrics.get("train/grad_norm", 0.0)))
        self.shapes = max(self.shapes, 0 if module._graphs is None else len(module._graphs))


def train(folder, rows, target, recorded, attention, precision, accumulate, compiled=False):
    seed_everything(0)
    datamodule = OnlineHiddenStates(
        target=folder,
        train_data=str(rows),
        max_length=128,
        batch_size=2,
        num_anchors=4,
        pad_multiple=32,
        num_workers=2,  # with a thread that page-locks batches while graphs are recorded
    )
    datamodule.use_target(target)
    watch = Watch()
    module = DrafterModule(
        num_layers=2,
        num_taps=2,
        attention=attention,
        cuda_graphs=recorded,
        compile_drafter=compiled,
        learning_rate=1e-4,
    )
    Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=4,
        accumulate_grad_batches=accumulate,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[watch],
    ).fit(module, datamodule)
    return watch, {name: p.detach().cpu() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("attention", "precision", "accumulate", "compiled"),
    [
        ("sdpa", "32-true", 1, False),
        ("sdpa", "bf16-mixed", 2, False),
        ("flex", "bf16-mixed", 1, False),
        ("sdpa", "bf16-mixed", 1, True),
        ("flex", "bf16-mixed", 1, True),
    ],
)
def test_recorded_runs_learn_the_same(tmp_path, attention, precision, accumulate, compiled):
    rows = tmp_path / "rows.jsonl"
    generator = torch.Generator().manual_seed(0)
    with rows.open("w") as file:
        for row in range(12):
            length = 40 + 30 * (row % 3)
            ids = torch.randint(8, 200, (length,), generator=generator).tolist()
            file.write(json.dumps({"prompt_ids": ids[:8], "response_ids": ids[8:]}) + "\n")
    folder = tiny_target_dir(tmp_path, "llama", head_dim=16)
    target = Target.load(folder, device="cuda")
    settings = (attention, precision, accumulate)
    plain, expected = train(folder, rows, target, False, *settings)
    watch, found = train(folder, rows, target, True, *settings, compiled)
    assert plain.shapes == 0
    assert watch.shapes >= 2
    loose = precision != "32-true"
    for ours, theirs in zip(watch.losses, plain.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3 if loose else 1e-4)
    for ours, theirs in zip(watch.norms, plain.norms, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-2 if loose else 1e-3)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-2, atol=5e-4 if loose else 1e-5
        )
