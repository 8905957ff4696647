"""A gradient that is not finite changes no weight; the run stops with its batch, or counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafter.module import DrafterModule
from tests.runs import cli, same, scalars, weights


def spoil(monkeypatch, step):
    """Makes the loss of one step NaN."""
    real = DrafterModule.training_step

    def spoilt(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == step else loss

    monkeypatch.setattr(DrafterModule, "training_step", spoilt)


@pytest.mark.parametrize("step", [3, 9])
def test_the_run_stops_with_the_batch_saved_and_its_weights_whole(
    tmp_path, monkeypatch, capsys, step
):
    with monkeypatch.context() as patch:
        spoil(patch, step)
        with pytest.raises(SystemExit) as stop:
            cli(tmp_path, checkpoint_last__every_n_steps=1)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"The gradient of step {step} is not finite (rows " in error
    (file,) = (tmp_path / "run").glob(f"nonfinite-step{step}-rank0.safetensors")
    batch = load_file(file)
    assert {"input_ids", "anchors", "hidden_states", "sample_ids"} <= batch.keys()
    saved = weights(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(tmp_path, monkeypatch):
    whole, skipping = tmp_path / "whole", tmp_path / "skipping"
    whole.mkdir(), skipping.mkdir()
    before = cli(whole, trainer__max_steps=4, model__total_steps=10)
    spoil(monkeypatch, 4)
    after = cli(skipping, trainer__max_steps=5, model__total_steps=10, model__on_nonfinite="skip")
    assert same(weights(after), weights(before))
    for ours, theirs in zip(
        after.trainer.optimizers[0].state.values(),
        before.trainer.optimizers[0].state.values(),
        strict=True,
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert after.model._guard.skipped == 1


def test_skipped_steps_are_counted_in_tensorboard(tmp_path, monkeypatch):
    spoil(monkeypatch, 3)
    run = cli(tmp_path, model__on_nonfinite="skip")
    assert run.trainer.global_step == 10
    counted = scalars(tmp_path / "run")["train/skipped_steps"]
    assert [value for _, value in counted] == [0.0] * 4 + [1.0] * 6
    assert all(torch.isfinite(value).all() for value in weights(run).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_adamw_skips_by_itself_on_a_gpu():
    from drafter.guard import NonFiniteGuard

    weight = torch.nn.Parameter(torch.randn(5, 5, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NonFiniteGuard("skip")
    for step, scale in enumerate((1.0, float("nan"), 1.0)):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, scale)
        guard.protect(optimizer, [weight], weight.grad.norm(), None, step)  # type: ignore[arg-type]
        optimizer.step()
        assert torch.equal(before, weight) == (step == 1)
        assert torch.isfinite(weight).all()
    assert float(optimizer.state[weight]["step"]) == 2
    guard.settle(Path("unused"), 0)
    assert guard.skipped == 1  # the second of three: two steps later
    guard.settle(Path("unused"), 0, everything=True)
    assert guard.skipped == 1
