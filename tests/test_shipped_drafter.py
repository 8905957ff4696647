"""Guards assets/smollm2-drafter: small, whole, in the published layout, and a working drafter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from drafter.evaluation.loading import load_drafter
from tests.runs import ROOT

FOLDER = ROOT / "assets" / "smollm2-drafter"
TARGET = ROOT / ".target" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_folder_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files.keys() == {
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
        "provenance.json",
    }
    assert sum(files.values()) < 40e6
    card = (FOLDER / "README.md").read_text()
    assert "## Accepted length" in card
    for path in FOLDER.glob("*.[jym]*"):
        if path.suffix != ".safetensors":
            assert "/tmp/" not in path.read_text(), path.name


def test_the_weights_are_the_configs_and_nothing_else():
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["num_hidden_layers"], config["block_size"]) == (4, 16)
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not [name for name in tensors if "embed" in name or "lm_head" in name]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    loaded = load_drafter(str(FOLDER))
    assert loaded.drafter.state_dict().keys() == tensors.keys()


@pytest.mark.slow
def test_it_drafts_for_its_target_on_a_cpu(tmp_path):
    from evaluate import main

    out = tmp_path / "out.json"
    words = ["report", "--ckpt", str(FOLDER), "--target", str(TARGET), "--dtype", "float32"]
    words += ["--prompts", str(ROOT / "assets" / "showcase.jsonl"), "--limit", "3"]
    words += ["--max-new-tokens", "48", "--cache-dir", str(tmp_path), "--no-progress"]
    main([*words, "--output", str(out)])
    (one,) = json.loads(out.read_text())["drafters"]
    figures = one["figures"]["replay"]["sets"]["showcase"]
    assert figures["accepted_length"]["value"] > 2
