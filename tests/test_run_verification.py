"""Verification inside a run: what it logs, what it must not touch, what a drafter can reach."""

from __future__ import annotations

import json

import pytest
import torch

from tests.runs import cli, same, scalars, weights


def test_turning_verification_on_or_off_leaves_training_bit_identical(tmp_path):
    results = []
    for name, changes in (
        ("off", {"verification__every_n_epochs": 0}),
        ("greedy", {}),
        ("sampled", {"verification__temperature": 1.0, "verification__mode": "decode"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        results.append(weights(cli(folder, **changes)))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_every_promised_tag_is_in_the_event_files(tmp_path):
    cli(tmp_path, model__log_gradient_norms_every=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    promised = {
        "val/accepted_length", "val/accepted_length/held_out", "val/waste_ratio",
        "val/accepted_length_unclipped", "val/verification_seconds", "val/cross_entropy",
        "val/block_accepted_length", "train/cross_entropy", "train/cross_entropy_uniform",
        "train/focal", "train/chain", "train/loss", "train/accepted_length", "train/grad_norm",
        "train/grad_norm/chain", "train/lr",
    }  # fmt: skip
    promised |= {f"val/accept_rate_pos_{k}" for k in (1, 2, 3)}
    assert promised <= set(tags["scalars"])
    assert "val/round_lengths" in tags["histograms"]
    assert "val/sample/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    text = events.Tensors("val/sample/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "⟦" in text


def test_verification_runs_before_training_and_after_each_epoch_on_named_sets(tmp_path, capsys):
    prompts = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"What is the sum of two and three? {i}"} for i in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli(tmp_path, verification__prompt_sets={"sums": str(prompts)})
    logged = scalars(tmp_path / "run")
    for tag in ("val/accepted_length", "val/accepted_length/sums", "val/accepted_length/held_out"):
        assert [step for step, _ in logged[tag]] == [0, 4, 9]
    printed = capsys.readouterr().out
    assert "[before training] accepted length" in printed
    assert "[epoch 1] accepted length" in printed


def test_stored_responses_are_used_only_on_trust_and_their_share_is_logged(tmp_path):
    cli(tmp_path, verification__trust_responses=True)
    share = scalars(tmp_path / "run")["val/responses_equal_target_argmax"]
    assert all(0 <= value < 1 for _, value in share)
    other = tmp_path / "other"
    other.mkdir()
    cli(other)
    assert "val/responses_equal_target_argmax" not in scalars(other / "run")


def test_replay_and_the_real_loop_log_the_same_figures(tmp_path):
    logged = []
    for mode in ("replay", "decode"):
        folder = tmp_path / mode
        folder.mkdir()
        cli(folder, verification__mode=mode, trainer__max_epochs=4, model__learning_rate=5e-3)
        logged.append(scalars(folder / "run"))
    for tag in ("val/accepted_length", "val/waste_ratio", "val/accept_rate_pos_1"):
        values = [[value for _, value in log[tag]] for log in logged]
        assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_overfitting_one_conversation_reaches_full_blocks(tmp_path):
    """The row is the target's own answer; a drafter that knows it by heart drafts it all."""
    first = cli(tmp_path, trainer__max_epochs=1)
    target = first.datamodule.target
    chat = [{"role": "user", "content": "Tell me about the weather."}]
    ids = target.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    row = {"prompt_ids": ids, "response_ids": target.generate([ids], 30)[0].ids}
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    run = cli(
        tmp_path,
        run_dir=str(tmp_path / "overfit"),
        data__train_data=str(rows),
        data__val_data=str(rows),
        data__num_anchors=64,
        trainer__max_epochs=150,
        trainer__check_val_every_n_epoch=150,
        model__learning_rate=5e-3,
        model__num_layers=2,
        verification__max_new_tokens=30,
        verification__before_training=False,
        verification__every_n_epochs=150,
    )
    assert len(row["response_ids"]) == 30
    metrics = run.trainer.callback_metrics
    assert metrics["val/accepted_length_unclipped"] == run.model.drafter.config.block_size
    assert metrics["val/accepted_length"] > 3.5


def test_train_and_eval_modes_survive_verification(tmp_path, monkeypatch):
    from drafter.module import DrafterModule

    seen = []
    real = DrafterModule.training_step

    def step(self, batch, batch_idx):
        seen.append((self.drafter.training, self.target.model.training, torch.is_grad_enabled()))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DrafterModule, "training_step", step)
    cli(tmp_path)
    assert set(seen) == {(True, False, True)}


def test_validate_reports_a_checkpoint_and_writes_no_run(tmp_path, capsys):
    run = cli(tmp_path)
    expected = float(run.trainer.callback_metrics["val/accepted_length"])
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    result = cli(tmp_path, "validate", extra=("--ckpt_path", checkpoint))
    assert float(result.trainer.callback_metrics["val/accepted_length"]) == pytest.approx(expected)
    result = cli(tmp_path, "test", extra=("--ckpt_path", checkpoint))
    assert float(result.trainer.callback_metrics["test/accepted_length"]) == pytest.approx(expected)
    assert "test/cross_entropy" in result.trainer.callback_metrics
    assert not (tmp_path / "run-2").exists()


@pytest.mark.parametrize(
    "end", [{"trainer__max_epochs": 4}, {"trainer__max_steps": 20, "trainer__max_epochs": 9}]
)
def test_a_run_s_last_drafter_is_measured(tmp_path, end):
    run = cli(tmp_path, verification__every_n_epochs=3, data__num_anchors=2, **end)
    measured = scalars(tmp_path / "run")["val/accepted_length"]
    assert len(measured) == 3  # before training, after the third epoch, at the end
    assert measured[-1][0] == run.trainer.global_step - 1
