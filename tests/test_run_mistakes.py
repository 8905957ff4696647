"""A user's mistake is one clear sentence and no traceback."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from data.online import OnlineHiddenStates
from drafter.errors import UserError
from drafter.module import DrafterModule
from tests.runs import cli, config


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def no_template(folder, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    real = PreTrainedTokenizerFast.from_pretrained

    def without(*args, **kwargs):
        tokenizer = real(*args, **kwargs)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", without)
    return {}


def nan_states(folder, monkeypatch):
    from drafter.target import Target

    real = Target.features

    def broken(self, *args, **kwargs):
        features = real(self, *args, **kwargs)
        features.hidden_states[0, 3, 1] = torch.nan
        return features

    monkeypatch.setattr(Target, "features", broken)
    return {"verification__every_n_epochs": 0, "trainer__limit_val_batches": 0}


def too_big_tokenizer(folder, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    real = PreTrainedTokenizerFast.from_pretrained

    def bigger(*args, **kwargs):
        tokenizer = real(*args, **kwargs)
        tokenizer.add_tokens([f"<extra{i}>" for i in range(300)])
        return tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", bigger)
    rows = [{"prompt": "<extra299>", "response": "<extra298><extra297> and so on"}] * 4
    return {"data__train_data": write(folder / "big.jsonl", rows)}


def malformed(folder, _):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "response": "b c d e"}\n{"prompt": \n')
    return {"data__train_data": str(folder / "bad.jsonl"), "data__val_rows": 0}


def rows(folder, content):
    return {"data__train_data": write(folder / "r.jsonl", [content] * 3), "data__val_rows": 0}


ANSWER = {"prompt": "What?", "response": "The answer is five."}
MISTAKES = {
    "missing file": (lambda f, m: {"data__train_data": str(f / "nowhere.jsonl")}, "nowhere.jsonl"),
    "malformed line": (malformed, r"bad\.jsonl.*2"),
    "empty response": (lambda f, m: rows(f, {"prompt": "a", "response": ""}), "(?i)empty response"),
    "no supervised token": (
        lambda f, m: rows(f, {"messages": [{"role": "user", "content": "hello there"}]}),
        "(?i)supervised|assistant",
    ),
    "context too long": (lambda f, m: {"data__max_length": 100_000}, "512"),
    "unknown layer": (lambda f, m: {"model__target_layer_ids": [0, 17]}, "17"),
    "last layer": (lambda f, m: {"model__target_layer_ids": [0, 3]}, "3"),
    "mask id out of range": (lambda f, m: {"model__mask_token_id": 256}, "256"),
    "mask id is eos": (lambda f, m: {"model__mask_token_id": 2}, "(?i)eos|end"),
    "K of 0": (lambda f, m: {"model__block_size": 0}, "block_size is 0"),
    "K of 1": (lambda f, m: {"model__block_size": 1}, "block_size is 1"),
    "no chat template": (no_template, "(?i)chat template"),
    "tokenizer too big": (too_big_tokenizer, "(?i)token"),
    "NaN hidden states": (nan_states, "(?i)row .*layer .*position"),
    "no target there": (lambda f, m: {"data__target": str(f / "no-target")}, "no-target"),
    "no checkpoint there": (lambda f, m: {}, "nowhere.ckpt"),
    "negative weight": (lambda f, m: {"model__loss": {"alpha_chain": -1.0}}, "alpha_chain"),
    "flex on a CPU": (lambda f, m: {"model__attention": "flex"}, "CUDA"),
    "no held-out rows": (lambda f, m: {"data__val_rows": 0}, "val_rows"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_without_a_traceback(mistake, tmp_path, monkeypatch, capfd):
    prepare, message = MISTAKES[mistake]
    changes = prepare(tmp_path, monkeypatch)
    extra = ("--ckpt_path", "nowhere.ckpt") if mistake == "no checkpoint there" else ()
    with pytest.raises(SystemExit) as stop:
        cli(tmp_path, extra=extra, **changes)
    assert stop.value.code == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1, error
    assert re.search(message, error[0]), error[0]
    assert "Traceback" not in error[0]


def test_scaled_gradients_are_refused():
    """Lightning turns 16-mixed into bf16-mixed on a CPU by itself."""
    module = DrafterModule()
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    module._trainer = SimpleNamespace(strategy=strategy, precision="16-mixed")
    with pytest.raises(UserError, match="bf16-mixed"):
        module.setup("fit")


def test_out_of_memory_names_the_knobs(tmp_path, monkeypatch, capsys):
    import torch

    from drafter.module import DrafterModule
    from tests.runs import cli

    def full(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore.")

    monkeypatch.setattr(DrafterModule, "training_step", full)
    with pytest.raises(SystemExit) as stop:
        cli(tmp_path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for knob in ("data.batch_size", "data.num_anchors", "data.max_length", "7.00 GiB"):
        assert knob in error


def test_data_made_for_another_block_size_is_refused(tmp_path):
    settings = config(tmp_path)
    datamodule = OnlineHiddenStates(**settings["data"], block_size=8)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="slots for blocks of 8, the drafter drafts 4"):
        trainer.fit(DrafterModule(**settings["model"]), datamodule)
