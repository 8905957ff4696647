"""Guards exported drafters: layout, dtype, card, provenance, and that every command reads them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.config import DrafterConfig
from drafter.errors import UserError
from drafter.evaluation.loading import load_drafter
from drafter.export import OFF, export, main, model_card, provenance_of
from tests.runs import cli, config, find_target

LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cli(folder, trainer__max_steps=3)
    return folder


def test_the_folder_has_the_published_layout(run, tmp_path):
    output = tmp_path / "out"
    main([str(run / "run"), "--output", str(output)])
    tensors = load_file(output / "model.safetensors")
    assert set(tensors) == {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        *(f"layers.0.{name}.weight" for name in LAYER),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    said = json.loads((output / "config.json").read_text())
    assert said["architectures"] == ["DFlashDraftModel"]
    assert said["dtype"] == "bfloat16"
    assert (said["block_size"], said["model_type"]) == (4, "qwen3")
    assert set(said["dflash_config"]) == {"mask_token_id", "target_layer_ids"}
    assert DrafterConfig.from_pretrained(output).block_size == 4


def test_weights_are_the_runs_rounded_once(run, tmp_path):
    export(load_drafter(str(run / "run")), tmp_path / "half")
    export(load_drafter(str(run / "run")), tmp_path / "whole", "float32")
    trained = load_drafter(str(run / "run")).drafter.state_dict()
    half, whole = (load_drafter(str(tmp_path / n)).drafter.state_dict() for n in ("half", "whole"))
    for name, tensor in trained.items():
        assert torch.equal(whole[name], tensor)
        assert torch.equal(half[name], tensor.bfloat16())


def test_card_and_provenance_say_where_it_comes_from(run, tmp_path):
    (tmp_path / "note.md").write_text("## Data\n\nRows of ours.")
    output = tmp_path / "out"
    words = ["--note", str(tmp_path / "note.md"), "--title", "A drafter"]
    main([str(run / "run"), "--output", str(output), *words])
    card = (output / "README.md").read_text()
    assert card.startswith("# A drafter\n")
    assert "| `model.learning_rate` | 0.001 |" in card
    assert "Rows of ours." in card
    loaded, trained = load_drafter(str(output)), load_drafter(str(run / "run"))
    assert loaded.target_fingerprint == trained.target_fingerprint is not None
    assert loaded.target_path == trained.target_path
    assert loaded.provenance["fingerprint_before_rounding"] == trained.fingerprint
    assert loaded.provenance["settings"]["model.num_layers"] == 1
    assert loaded.provenance["runs"][0]["argv"]
    again = tmp_path / "again"
    export(loaded, again)  # what was known stays known
    assert (again / "config.yaml").read_text() == (output / "config.yaml").read_text()
    assert {file.stat().st_mode & 0o777 for file in again.iterdir()} == {0o644}
    assert load_drafter(str(again)).provenance == loaded.provenance
    assert load_drafter(str(again)).fingerprint == loaded.fingerprint


def test_a_card_lists_what_is_on_and_not_what_is_off(run):
    off = provenance_of(load_drafter(str(run / "run")))
    config = load_drafter(str(run / "run")).drafter.config.to_dict()
    assert off["settings"].keys() >= OFF.keys()
    card = model_card("A drafter", config, off)
    assert not any(name in card for name in OFF)
    on = {"model.draft_vocab_size": 20, "model.confidence_head": "attached"}
    on["data.visible_prefix.share"] = 0.5
    card = model_card("A drafter", config, off | {"settings": off["settings"] | on})
    for name, value in on.items():
        assert f"| `{name}` | {value} |" in card


def test_a_run_predicts_and_trains_on_from_it(run, tmp_path):
    output = tmp_path / "out"
    export(load_drafter(str(run / "run")), output, "float32")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Tell me about the weather."}\n')
    answers = {}
    for name, how in {
        "folder": ("--model.init_from", str(output)),
        "checkpoint": ("--ckpt_path", str(run / "run" / "checkpoints" / "last.ckpt")),
    }.items():
        answers[name] = tmp_path / f"{name}.jsonl"
        extra = (*how, "--predictions.output", str(answers[name]))
        # in another folder: the run has a drafter of its own
        place = {"run_dir": str(tmp_path / "new")} if name == "folder" else {}
        cli(run, "predict", extra, data__predict_prompts=str(prompts), **place)
    found = [json.loads(path.read_text()) for path in answers.values()]
    assert found[0]["response_ids"] == found[1]["response_ids"]
    assert found[0]["round_lengths"] == found[1]["round_lengths"]
    further = cli(run, run_dir=str(tmp_path / "further"), model__init_from=str(output))
    assert further.trainer.global_step > 0


def test_what_is_there_is_replaced_whole_or_not_at_all(run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(load_drafter(str(run / "run")), output)
    before = (output / "model.safetensors").read_bytes()
    spoiled = load_drafter(str(run / "run"))
    with torch.no_grad():
        spoiled.drafter.fc.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"fc.weight is not finite in bfloat16"):
        export(spoiled, output)
    with monkeypatch.context() as patch:
        patch.setattr("drafter.export.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(load_drafter(str(run / "run")), output)
    assert (output / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    target = tmp_path / "target"
    shutil.copytree(find_target(run), target)  # has a config.json, too
    (output / "mine.txt").write_text("mine")
    held = {path: sorted(path.iterdir()) for path in (target, output)}
    for path, files in held.items():
        with pytest.raises(UserError, match="what no export has written"):
            export(load_drafter(str(run / "run")), path)
        assert sorted(path.iterdir()) == files
    (tmp_path / "empty").mkdir()
    export(load_drafter(str(run / "run")), tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(load_drafter(str(run / "run")), tmp_path / "link", "float32")
    assert load_drafter(str(tmp_path / "empty")).drafter.dtype == torch.float32
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        export(load_drafter(str(run / "run")), output, "int8")


def test_a_resumed_run_is_told_by_its_last_piece(tmp_path):
    cli(tmp_path, trainer__max_steps=2)
    cli(
        tmp_path,
        extra=("--ckpt_path", "last"),
        trainer__max_steps=4,
        model__learning_rate=2e-4,
        model__total_steps=4,
    )
    export(load_drafter(str(tmp_path / "run")), tmp_path / "out")
    provenance = load_drafter(str(tmp_path / "out")).provenance
    assert provenance["settings"]["model.learning_rate"] == 2e-4
    assert [piece["resumed_at_step"] for piece in provenance["runs"]] == [0, 2]
    assert "| `model.learning_rate` | 0.0002 |" in (tmp_path / "out" / "README.md").read_text()


def test_figures_of_another_drafter_are_not_put_on_a_card(run, tmp_path):
    loaded = load_drafter(str(run / "run"))
    other = {"drafters": [{"name": "other", "fingerprint": "0" * 20, "figures": {}}]}
    with pytest.raises(UserError, match="the results are of other drafters"):
        export(loaded, tmp_path / "out", result=other)
    assert not (tmp_path / "out").exists()


def test_a_drafter_of_other_blocks_or_another_run_is_not_measured_unawares(run, tmp_path, capsys):
    output = tmp_path / "out"
    export(load_drafter(str(run / "run")), output)
    new = str(tmp_path / "new")
    with pytest.raises(SystemExit):
        cli(run, "test", run_dir=new, model__init_from=str(output), model__block_size=8)
    assert "set --model.block_size 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli(run, "test", model__init_from=str(output))
    assert "has a drafter of its own" in capsys.readouterr().err


def test_a_run_goes_on_without_the_drafter_that_it_began_with(run, tmp_path):
    output, further = tmp_path / "out", str(tmp_path / "further")
    export(load_drafter(str(run / "run")), output)
    settings = {"run_dir": further, "model__init_from": str(output)}
    cli(run, **settings, trainer__max_steps=2)
    shutil.rmtree(output)
    last = cli(run, extra=("--ckpt_path", "last"), **settings, trainer__max_steps=4)
    assert last.trainer.global_step == 4
    cli(run, "test", ("--ckpt_path", "last"), **settings)


def test_a_spoiled_provenance_is_named(run, tmp_path):
    output = tmp_path / "out"
    export(load_drafter(str(run / "run")), output)
    (output / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance.json can't be read"):
        load_drafter(str(output))


def test_missing_tensors_are_named(run, tmp_path):
    output = tmp_path / "out"
    export(load_drafter(str(run / "run")), output)
    tensors = load_file(output / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing tensors \['norm.weight'\]"):
        load_drafter(str(output))


def test_predicting_without_a_drafter_names_both_ways(run, tmp_path, capsys):
    assert config(run)["run_dir"]
    with pytest.raises(SystemExit):
        cli(run, "predict", data__predict_prompts=str(tmp_path / "none.jsonl"))
    assert "--model.init_from with a drafter's folder" in capsys.readouterr().err
