"""Guards the training bar: it looks at metrics after logged steps only; a user's own bar stays."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from callbacks.progress import TrainingBar
from tests.runs import cli


def bars(run):
    return [callback for callback in run.trainer.callbacks if isinstance(callback, ProgressBar)]


def test_metrics_are_looked_at_after_logged_steps_only(tmp_path, monkeypatch):
    looked = []
    whole = RichProgressBar.get_metrics

    def get_metrics(self, trainer, module):
        looked.append((trainer.training, trainer.global_step))
        return whole(self, trainer, module)

    monkeypatch.setattr(RichProgressBar, "get_metrics", get_metrics)
    run = cli(
        tmp_path,
        trainer__enable_progress_bar=True,
        trainer__log_every_n_steps=3,
        trainer__max_epochs=2,
    )
    (bar,) = bars(run)
    assert isinstance(bar, TrainingBar)
    steps = [step for training, step in looked if training]
    assert steps[0] <= 1  # the first: nothing was shown before
    assert {3, 6, 9} <= set(steps)
    assert all(step % 3 == 0 for step in steps[1:])
    assert "ce" in bar.get_metrics(run.trainer, run.model)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_users_own_bar_or_none_stays(tmp_path, enabled):
    given = [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}] if enabled else []
    run = cli(
        tmp_path,
        trainer__enable_progress_bar=enabled,
        trainer__callbacks=given,
        trainer__max_steps=1,
    )
    assert [type(bar).__name__ for bar in bars(run)] == ["TQDMProgressBar"] * enabled
