"""Guards the training bar: it shows what was logged last; a user's own bar stays."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from tests.runs import cli, scalars


def bars(run):
    return [callback for callback in run.trainer.callbacks if isinstance(callback, ProgressBar)]


class Shown(Callback):
    """Keeps what bars are given before every step: what the step before left."""

    def __init__(self):
        self.shown = []

    def on_train_batch_start(self, trainer, *_):
        self.shown.append(dict(trainer.progress_bar_metrics))


def test_the_bar_shows_what_was_logged_last(tmp_path):
    run = cli(
        tmp_path,
        trainer__enable_progress_bar=True,
        trainer__log_every_n_steps=3,
        trainer__max_epochs=2,
        trainer__callbacks=[{"class_path": "tests.test_progress.Shown"}],
    )
    (bar,) = bars(run)
    (watch,) = [each for each in run.trainer.callbacks if isinstance(each, Shown)]
    assert type(bar) is RichProgressBar
    assert bar.refresh_rate == 4
    found = scalars(tmp_path / "run")
    curves = {name: dict(found[f"train/{name}"]) for name in ("cross_entropy", "accepted_length")}
    assert curves["cross_entropy"].keys() >= {2, 5, 8}
    before = {}
    for step, shown in enumerate(watch.shown):
        if step - 1 in curves["cross_entropy"]:
            before = {"ce": curves["cross_entropy"][step - 1]}
            before["tau"] = curves["accepted_length"][step - 1]
        assert {name: shown.get(name) for name in before} == pytest.approx(before, rel=1e-5)
        assert before or "ce" not in shown


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
