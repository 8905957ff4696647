"""Guards the full-size benchmark: published shapes, the recipes' own settings, figures that fit."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import full_size
from tests.runs import ROOT
from tests.test_target_recipes import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_the_published_size(name):
    config, real = full_size.target_config(name), TARGETS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e9 == pytest.approx(real.billions, abs=0.005)
    assert config.model_type == real.family
    assert config.tie_word_embeddings is real.tied
    assert config.rope_parameters == real.rope
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    assert shape == (real.layers, real.hidden, real.mlp)
    assert (config.num_attention_heads, config.vocab_size) == (real.heads, real.vocabulary)


def test_every_recipe_runs_and_a_failure_stops_none_of_the_others(tmp_path, monkeypatch, capsys):
    output = tmp_path / "full_size.jsonl"
    words = ["--toy", "--steps", "1", "--output", str(output)]
    real = full_size.full_target

    def fails_once(name, *rest):
        if name == "llama-3-8b-instruct":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(name, *rest)

    monkeypatch.setattr(full_size, "full_target", fails_once)
    full_size.main(words)
    rows = {row["recipe"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == list(full_size.PUBLISHED)
    assert rows.pop("llama-3-8b-instruct")["failed"] == "out of memory"
    assert "| llama-3-8b-instruct | out of memory |" in capsys.readouterr().out
    for row in rows.values():
        assert "failed" not in row
        assert row["optimizer_steps"] == 2  # one of them before the clock
        # two moments, and a step count for each of at most 50 tensors
        assert 0 <= row["optimizer_bytes"] - 2 * row["drafter_bytes"] <= 50 * 4
        assert 0 < row["target_seconds"] < row["batch_seconds"] < row["step_seconds"]
        tokens = row["rows"] * row["tokens"] * row["accumulate"]
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(tokens)
        a_second = row["tokens_per_second"] / row["tokens"]
        assert row["epoch_hours"] == pytest.approx(200_000 / a_second / 3600)

    # what failed is tried again, and nothing else
    asked = []
    monkeypatch.setattr(full_size, "measure", lambda name, _: asked.append(name) or {"failed": "x"})
    full_size.main(words)
    assert asked == ["llama-3-8b-instruct"]
    full_size.main([*words, "--warmup", "2"])  # other figures than those
    assert asked[1:] == list(full_size.PUBLISHED)


MEASURED = {
    "recipe": "llama-3-8b-instruct",
    "rows": 4,
    "accumulate": 8,
    "target_parameters": 8_030_000_000,
    "drafter_parameters": 939_600_000,
    "batch_seconds": 0.309,
    "target_seconds": 0.230,
    "step_seconds": 2.46,
    "blocks_per_second": 625.0,
    "tokens_per_second": 26_678.0,
    "epoch_hours": 4.3,
    "target_bytes": 16_100_000_000,
    "drafter_peak_bytes": 21_300_000_000,
    "predicted_bytes": 21_200_000_000,
    "over_weights_bytes": 10_000_000_000,
    "peak_bytes": 37_300_000_000,
}


def test_the_tables_are_the_page_s(tmp_path, capsys):
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = [MEASURED, {"recipe": "qwen3-4b", "failed": "out of memory"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    full_size.main(["--table", str(path)])
    time, memory = capsys.readouterr().out.strip().split("\n\n")
    *shown, failed = time.splitlines()
    assert "\n".join(shown) in page
    assert failed.startswith("| qwen3-4b | out of memory |")
    assert memory in page


@pytest.mark.parametrize(
    "content", ["no JSON", "[1]\n", "3\n", '{"recipe": "x"}\n', '{"shape": 1}\n', b"\xff\xfe"]
)
def test_another_file_is_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "other"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words in (["--table", str(path)], ["--toy", "--output", str(path)]):
        with pytest.raises(SystemExit) as stopped:
            full_size.main(words)
        assert stopped.value.code == 2
        assert "is not what --output of benchmarks.full_size writes" in capsys.readouterr().err


@pytest.mark.parametrize("name", full_size.PUBLISHED)
def test_the_step_is_the_recipe_s_own(name):
    text = (full_size.RECIPES / f"{name}.yaml").read_text()
    assert full_size.recipe(name) == yaml.safe_load(text)
    toy = full_size.recipe(name, toy=True)
    assert toy["model"] == full_size.recipe(name)["model"]  # only batches and precision differ


def test_memory_is_told_apart():
    watch = full_size.Watch(on_gpu=False)  # times are seconds here
    watch.facts = {"drafter_bytes": 10, "optimizer_bytes": 20}
    watch.others = 100
    watch.estimate = full_size.MemoryEstimate(10, 10, 20, 0, 5, 30, 5)
    settings = {
        "data": {"batch_size": 1, "num_anchors": 3, "max_length": 8},
        "trainer": {"accumulate_grad_batches": 2},
    }
    watch.marks = [(float(i), i + 0.25, i + 1.0) for i in range(6)]
    watch.peaks = [(900, 900), (130, 150), (140, 160), (170, 155), (140, 160), (165, 150)]
    line = full_size._figures(watch, settings, warmup=1)
    assert (line["peak_bytes"], line["warmup_peak_bytes"]) == (170, 900)
    assert line["drafter_peak_bytes"] == 60  # of 160, where the target's 100 and more lie apart
    assert line["over_weights_bytes"] == 30
    assert line["over_predicted"] == pytest.approx(0.75)
    assert (line["batch_seconds"], line["target_seconds"]) == (1.0, 0.25)
    assert line["step_seconds"] == 2.0
    assert line["blocks_per_second"] == 3.0
