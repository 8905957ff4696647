"""Whole runs: what a step does, what a checkpoint holds, what a resumed run repeats."""

from __future__ import annotations

import pytest
import torch

from drafter.model import Drafter
from drafter.module import DrafterModule
from drafter.target import Target
from drafter.training_log import WindowLog
from tests.runs import cli, same, scalars, weights


def test_a_step_makes_exactly_one_drafter_forward_whatever_losses_are_on(tmp_path, monkeypatch):
    calls = {"denoise": 0, "encode": 0, "steps": 0}
    denoise, encode, step = Drafter.denoise, Drafter.encode_context, DrafterModule.training_step

    def counted(name, function):
        def wrapper(self, *args, **kwargs):
            calls[name] += 1
            return function(self, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(Drafter, "denoise", counted("denoise", denoise))
    monkeypatch.setattr(Drafter, "encode_context", counted("encode", encode))
    monkeypatch.setattr(DrafterModule, "training_step", counted("steps", step))
    for loss in (
        {"gamma": float("inf"), "alpha_focal": 0.0, "alpha_chain": 0.0},
        {"gamma": 10.0, "alpha_focal": 0.3, "alpha_chain": 40.0},
    ):
        for every in (0, 1):  # gradient norms of every term cost no forward either
            calls.update(denoise=0, encode=0, steps=0)
            folder = tmp_path / f"{loss['alpha_chain']}-{every}"
            folder.mkdir()
            cli(
                folder,
                model__loss=loss,
                model__log_gradient_norms_every=every,
                trainer__limit_val_batches=0,
                trainer__max_epochs=1,
                verification__every_n_epochs=0,
            )
            assert calls["steps"] == 5
            assert calls["denoise"] == calls["encode"] == calls["steps"]


def test_the_checkpoint_holds_drafter_weights_only_and_loads_under_weights_only(tmp_path):
    run = cli(tmp_path)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert path.with_name("best.ckpt").exists()
    checkpoint = torch.load(path, weights_only=True)
    expected = {f"drafter.{name}" for name in run.model.drafter.state_dict()}
    assert set(checkpoint["state_dict"]) == expected
    loaded = DrafterModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(weights(loaded_cli(loaded)), weights(run))
    assert loaded.hparams.learning_rate == 1e-3
    assert loaded.loss == run.model.loss
    assert loaded.drafter.config.target_layer_ids == run.model.drafter.config.target_layer_ids


def loaded_cli(module):
    return type("Loaded", (), {"model": module})


def test_the_target_is_never_trained_and_nobody_owns_it(tmp_path):
    run = cli(tmp_path, trainer__max_epochs=1)
    target = run.datamodule.target
    fresh = type(target).load(target.path, gguf_file=target.gguf_file)
    for now, before in zip(target.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(now, before)
        assert now.grad is None
        assert not now.requires_grad
    optimised = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in run.model.drafter.parameters()}
    assert not target.model.training
    assert run.model.drafter.training


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_stopped_in_an_epoch_and_resumed_ends_with_the_same_weights(tmp_path, keep):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    settings = {"model__total_steps": 10, "data__keep_in_memory": keep}
    whole = cli(straight, **settings)
    cli(broken, trainer__max_steps=7, **settings)
    resumed = cli(broken, extra=("--ckpt_path", "last"), **settings)
    assert resumed.trainer.global_step == whole.trainer.global_step == 10
    assert same(weights(resumed), weights(whole))
    assert (broken / "run" / "config.resume-1.yaml").exists()
    joined, expected = scalars(broken / "run"), scalars(straight / "run")
    assert joined["train/cross_entropy"] == expected["train/cross_entropy"]


def test_the_users_settings_win_over_those_in_a_resumed_checkpoint(tmp_path, capsys):
    cli(tmp_path, model__total_steps=10, trainer__max_steps=5)
    resumed = cli(
        tmp_path,
        model__total_steps=10,
        extra=("--ckpt_path", "last", "--model.learning_rate", "1e-5"),
    )
    rates = [group["lr"] for group in resumed.trainer.optimizers[0].param_groups]
    assert max(rates) < 1e-5
    assert resumed.model.hparams.learning_rate == 1e-5
    assert "model.learning_rate: checkpoint 0.001, this run 1e-05" in capsys.readouterr().out


def test_a_second_run_neither_fails_nor_overwrites(tmp_path):
    cli(tmp_path, trainer__max_steps=1)
    first = (tmp_path / "run" / "config.yaml").read_text()
    cli(tmp_path, trainer__max_steps=1)
    assert (tmp_path / "run" / "config.yaml").read_text() == first
    assert (tmp_path / "run-2" / "checkpoints" / "last.ckpt").exists()


def test_accumulated_micro_batches_give_the_whole_windows_loss_and_gradient(tmp_path):
    def run(name, batch_size, accumulate):
        folder = tmp_path / name
        folder.mkdir()
        result = cli(
            folder,
            data__batch_size=batch_size,
            trainer__accumulate_grad_batches=accumulate,
            trainer__max_epochs=1,
            model__loss={"gamma": 10.0, "alpha_focal": 0.0, "alpha_chain": 40.0},
        )
        return weights(result), scalars(folder / "run")

    whole, whole_log = run("whole", 8, 1)
    parts, parts_log = run("parts", 2, 4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-5, rtol=1e-4)
    for tag in ("train/cross_entropy", "train/chain", "train/focal", "train/loss"):
        for (_, a), (_, b) in zip(whole_log[tag], parts_log[tag], strict=True):
            assert abs(a - b) < 1e-4


def test_features_kept_in_memory_give_the_same_training(tmp_path):
    results = []
    for keep in (False, True, "device"):
        folder = tmp_path / str(keep)
        folder.mkdir()
        results.append(weights(cli(folder, data__keep_in_memory=keep)))
    for other in results[1:]:
        for name in results[0]:
            torch.testing.assert_close(other[name], results[0][name], atol=1e-5, rtol=1e-4)


def test_kept_features_are_computed_before_the_first_step_if_all_are_needed(tmp_path, monkeypatch):
    asked = []
    features = Target.features

    def counted(self, input_ids, *args, **kwargs):
        asked.append(len(input_ids))
        return features(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Target, "features", counted)
    monkeypatch.setattr("data.online.KEPT_AT_ONCE", 4 * 64)
    settings = {"data__keep_in_memory": True, "data__val_rows": 0, "trainer__max_epochs": 1}
    settings["verification__every_n_epochs"] = 0
    whole = cli(tmp_path, **settings)
    rows = whole.datamodule.train_rows
    assert sum(asked) == len(rows) == 12
    assert max(asked) > 2  # the rows of more than a batch
    assert len(asked) < whole.trainer.global_step
    for (_, layer_ids, sample), kept in whole.datamodule._kept.items():
        alone = torch.from_numpy(rows[sample].input_ids).long()[None]
        own = features(whole.datamodule.target, alone, torch.zeros_like(alone), layer_ids)
        torch.testing.assert_close(kept.states, own.hidden_states[0], atol=1e-5, rtol=1e-4)
    asked.clear()
    cli(tmp_path, trainer__limit_train_batches=2, **settings)
    assert asked == [2, 2]
    asked.clear()
    cli(tmp_path, trainer__max_steps=1, **settings)
    assert asked == [2]


def test_a_run_may_start_from_another_runs_weights(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    trained = cli(first, trainer__max_epochs=1)
    changes = {
        "data__target": trained.datamodule.target.path,
        "model__init_from": str(first / "run"),
        "model__loss": {"gamma": float("inf"), "alpha_focal": 0.0, "alpha_chain": 0.0},
        "model__learning_rate": 0.0,
    }
    further = cli(second, **changes)
    assert further.trainer.global_step == 10  # steps and schedule begin anew
    assert further.model.loss.gamma == float("inf")
    assert same(weights(further), weights(first / "run" / "checkpoints" / "best.ckpt"))
    with pytest.raises(SystemExit):
        cli(second, model__target_layer_ids=[0, 1], **changes)
    assert "leave the latter out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli(second, **{**changes, "model__init_from": "nowhere"})
    assert "nowhere: no checkpoint, run folder or drafter folder" in capsys.readouterr().err


def test_a_block_size_of_ones_own_may_be_trained_further(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    trained = cli(first, trainer__max_epochs=1)
    further = cli(
        second,
        data__target=trained.datamodule.target.path,
        model__init_from=str(first / "run"),
        model__block_size=6,
    )
    assert further.model.drafter.config.block_size == 6


def test_only_what_is_written_is_computed(tmp_path, monkeypatch):
    """Every third step is logged; what is logged there is that step's own, as if all were."""
    added = []
    real = WindowLog.add
    monkeypatch.setattr(WindowLog, "add", lambda self, *a: (added.append(1), real(self, *a))[1])
    for every in (1, 3):
        cli(
            tmp_path,
            run_dir=str(tmp_path / f"every{every}"),
            trainer__log_every_n_steps=every,
            trainer__limit_val_batches=0,
            verification__every_n_epochs=0,
        )
    assert len(added) == 10 + 3
    all_of_them, some = (scalars(tmp_path / f"every{every}") for every in (1, 3))
    for tag in ("train/cross_entropy", "train/accepted_length", "train/grad_norm", "train/lr"):
        assert [step for step, _ in some[tag]] == [2, 5, 8]
        assert set(some[tag]) <= set(all_of_them[tag])


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(tmp_path):
    eager = cli(tmp_path, trainer__max_epochs=1)
    compiled = cli(
        tmp_path,
        trainer__max_epochs=1,
        model__compile_drafter=True,
        run_dir=str(tmp_path / "compiled"),
    )
    expected, found = eager.model.state_dict(), compiled.model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
