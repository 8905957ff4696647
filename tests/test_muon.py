"""Guards Muon: torch's own, one matrix at a time, is its twin; a bad gradient changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import drafter.muon as muon_module
from drafter.memory import StepSizes, estimate_step
from drafter.muon import Muon, orthogonal
from tests.runs import cli, weights
from tests.test_run_training import same

SHAPES = [(8, 8), (8, 20), (8, 8), (20, 8), (6,), (8, 20), (3,)]


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def ours(own, **kwargs):
    matrices, vectors = [p for p in own if p.ndim > 1], [p for p in own if p.ndim == 1]
    return Muon(matrices, vectors, lr=0.01, **kwargs)


def give_gradients(own, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in own:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("weight_decay", "together"), [(0.0, 1 << 26), (0.1, 1 << 26), (0.1, 130)])
def test_steps_are_those_of_torchs_muon_and_adamw(monkeypatch, weight_decay, together):
    monkeypatch.setattr(muon_module, "MOST_VALUES", together)
    monkeypatch.setitem(muon_module.PRODUCTS, "cpu", torch.bfloat16)
    own, twins = parameters(), parameters()
    optimizer = ours(own, weight_decay=weight_decay, momentum=0.9, betas=(0.8, 0.9))
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
    muon = torch.optim.Muon(
        [p for p in twins if p.ndim > 1],
        lr=0.01,
        weight_decay=weight_decay,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [p for p in twins if p.ndim == 1], lr=0.01, betas=(0.8, 0.9), weight_decay=0.0
    )
    for step in range(4):
        for params in (own, twins):
            give_gradients(params, step)
        before = [p.detach().clone() for p in own]
        optimizer.step()
        muon.step()
        adamw.step()
        for one, twin, old in zip(own, twins, before, strict=True):
            moved = (twin - old).abs().max()
            assert moved > 0
            # products in bf16 round differently side by side than alone
            torch.testing.assert_close(one, twin, rtol=0, atol=0.03 * moved.item())


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_updates_have_singular_values_near_one(monkeypatch, products):
    monkeypatch.setitem(muon_module.PRODUCTS, "cpu", products)
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 16, 40), (2, 40, 16)):
        found = orthogonal(torch.randn(shape)).float()
        assert found.shape == shape
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_a_step_whose_gradient_is_not_finite_changes_nothing():
    own = parameters()
    optimizer = ours(own, fused=True)
    give_gradients(own, 0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = [p.detach().clone() for p in own]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    give_gradients(own, 1, scale=float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, old in zip(own, before, strict=True):
        assert torch.equal(parameter, old)
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state[number][name])


def test_its_state_is_saved_and_goes_on(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    changes = {"model__optimizer": "muon", "model__total_steps": 10, "model__weight_decay": 0.1}
    for folder in (straight, broken):
        folder.mkdir()
    whole = cli(straight, **changes)
    cli(broken, trainer__max_steps=7, **changes)
    resumed = cli(broken, extra=("--ckpt_path", "last"), **changes)
    assert resumed.trainer.global_step == whole.trainer.global_step == 10
    assert same(weights(resumed), weights(whole))
    drafter, (optimizer,) = whole.model.drafter, whole.trainer.optimizers
    sizes = StepSizes(1, 8, 1, 8, 8, optimizer="muon")
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert estimate_step(drafter.config, sizes).optimizer == sum(v.nbytes for v in kept if v.ndim)
    adamw = tmp_path / "adamw"
    adamw.mkdir()
    assert not same(weights(cli(adamw, model__total_steps=10)), weights(whole))


def test_another_optimizer_than_the_checkpoints_is_refused(tmp_path, capsys):
    cli(tmp_path, trainer__max_steps=3, model__total_steps=10)
    with pytest.raises(SystemExit):
        cli(
            tmp_path,
            model__total_steps=10,
            extra=("--ckpt_path", "last", "--model.optimizer", "muon"),
        )
    assert "trained with --model.optimizer adamw" in capsys.readouterr().err


def test_a_checkpoint_made_elsewhere_takes_this_runs_kernels(tmp_path):
    """Fused kernels are a GPU's: what a CPU saved must not switch them off there."""
    cli(tmp_path, trainer__max_steps=3, model__total_steps=6)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    for group in state["param_groups"]:
        group["fused"] = True
    torch.save(checkpoint, path)
    resumed = cli(
        tmp_path, trainer__max_steps=6, model__total_steps=6, extra=("--ckpt_path", "last")
    )
    assert not any(group["fused"] for group in resumed.trainer.optimizers[0].param_groups)
