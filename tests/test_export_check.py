"""Guards `python -m drafter.export check`: each fault is found, alone; launch lines are right."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
from drafter.config import DrafterConfig
from drafter.evaluation.loading import LoadedDrafter, drafter_fingerprint, load_drafter
from drafter.evaluation.results import summarise
from drafter.evaluation.tallies import COUNTS, Tally
from drafter.export import export, main
from drafter.export_check import check_export, read_config
from drafter.export_rules import said_by
from drafter.export_tensors import expected_shapes
from drafter.model import Drafter
from drafter.target import Target
from tests.runs import QUESTIONS, cli, find_target


def made() -> LoadedDrafter:
    """A small random drafter of one layer that knows its target's name."""
    config = DrafterConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        block_size=8,
        num_target_layers=6,
        dflash_config={"mask_token_id": 60, "target_layer_ids": [1, 3]},
    )
    drafter = Drafter(config).eval()
    return LoadedDrafter("ours", drafter, drafter_fingerprint(drafter), target_path="a/target")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("exports")
    for layout in ("zlab", "speculators"):
        export(made(), place / layout, layout=layout)
    return place


def spoil(folder, changes):
    """Changes keys of config.json, dots going down; `tensors` changes the weights."""
    said = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for dotted, value in changes.items():
        if dotted == "tensors":
            value(tensors)
            continue
        *groups, key = dotted.split(".")
        place = said
        for group in groups:
            place = place[int(group) if isinstance(place, list) else group]
        if value is None:
            del place[key]
        else:
            place[key] = value
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


def spoil_nan(tensors):
    tensors["norm.weight"][3] = torch.nan


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
def test_what_we_export_keeps_every_rule_and_says_how_to_launch(folders, layout, capsys):
    folder = folders / layout
    main(["check", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert f"{folder}: 0 of" in next(line for line in lines if "rules are broken" in line)
    assert not [line for line in lines if line.startswith("fault")]
    vllm = shlex.split(next(line for line in lines if line.startswith("vLLM:")))
    assert vllm[1:5] == ["vllm", "serve", "a/target", "--speculative-config"]
    assert json.loads(vllm[5]) == {
        "method": "dflash",
        "model": str(folder),
        "num_speculative_tokens": 7,
    }
    sglang = next(line for line in lines if line.startswith("SGLang:"))
    if layout == "zlab":
        assert sglang == (
            "SGLang: python -m sglang.launch_server --model-path a/target "
            f"--speculative-algorithm DFLASH --speculative-draft-model-path {folder} "
            "--speculative-num-draft-tokens 8"
        )
    else:
        assert "--format zlab" in sglang
    assert lines[-1].startswith("acceptance.json: none")


FAULTS = {
    "zlab": [
        ({"architectures": ["Drafter"]}, "architectures is"),
        ({"model_type": "llama"}, "model_type is"),
        ({"draft_vocab_size": 32}, "it drafts from"),
        ({"dflash_config.block_size": 16}, "block_size stands once"),
        ({"dflash_config.mask_token_id": 64}, "mask_token_id is a token"),
        ({"dflash_config.mask_token_id": None}, "mask_token_id is a token"),
        ({"dflash_config.target_layer_ids": [1, 5]}, "target layer ids"),
        ({"dflash_config.target_layer_ids": [3, 3]}, "target layer ids"),
        ({"is_causal": True, "dflash_config.causal": False}, "is_causal and"),
        ({"tensors": add("embed_tokens.weight", torch.zeros(64, 16).bfloat16())}, "no embedding"),
        ({"tensors": add("lm_head.weight", torch.zeros(64, 16).bfloat16())}, "no embedding"),
    ],
    "speculators": [
        ({"speculators_config": []}, "speculators_config pro"),
        ({"speculators_config.verifier": "a/target"}, "speculators_config.verifier"),
        ({"aux_hidden_state_layer_ids": None}, "target layer ids"),
        ({"aux_hidden_state_layer_ids": [0, 4]}, "target layer ids"),
        ({"aux_hidden_state_layer_ids": [2, 6]}, "target layer ids"),
        ({"draft_vocab_size": 0}, "draft_vocab_size"),
        ({"draft_vocab_size": 65}, "draft_vocab_size"),
        ({"draft_vocab_size": 32}, "all tensors"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"speculators_config.algorithm": "eagle3"}, "speculators_config.algorithm"),
        ({"speculators_config.verifier.name_or_path": None}, "speculators_config.verifier"),
        ({"speculators_config.proposal_methods.0.speculative_tokens": 8}, "speculators_config pro"),
        ({"speculators_config.default_proposal_method": "tree"}, "speculators_config pro"),
        ({"mask_token_id": None}, "mask_token_id is a token"),
        ({"transformer_layer_config.model_type": "llama"}, "transformer_layer_config.model_type"),
    ],
    "both": [
        ({"block_size": 65}, "block_size is 2 to"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["linear_attention"]}, "layer_types is full"),
        ({"layer_types": []}, "layer_types is full"),
        ({"layer_types": ["sliding_attention"]}, "sliding layers have a window"),
        ({"rope_theta": 1.0}, "rope_theta and"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling and"),
        ({"rope_parameters.rope_type": "linear"}, "rope_scaling and"),
        ({"rope_parameters.factor": 2.0}, "rope_scaling and"),
        ({"num_target_layers": 0}, "num_target_layers, if told"),
        ({"num_target_layers": "many"}, "num_target_layers, if told"),
        ({"vocab_size": "many"}, "sizes are"),
        ({"attention_bias": True}, "all tensors"),
        ({"vocab_size": 0}, "sizes are"),
        ({"intermediate_size": 32}, "shapes fit"),
        ({"dtype": "float32"}, "the file's dtype"),
        ({"dtype": "int8"}, "dtype is one of"),
        ({"tensors": lambda tensors: tensors.pop("fc.weight")}, "all tensors"),
        ({"tensors": add("layers.1.norm.weight", torch.ones(2).bfloat16())}, "no others"),
        ({"tensors": add("fc.weight", torch.zeros(16, 16).bfloat16())}, "shapes fit"),
        ({"tensors": add("norm.weight", torch.ones(16))}, "the file's dtype"),
        ({"tensors": spoil_nan}, "weights are finite"),
    ],
}
FOLLOWS = {
    "block_size is 2 to": {"speculators_config pro"},
    "speculators_config pro": {"speculators_config.verifier", "speculators_config.algorithm"},
    "sizes are": {"mask_token_id is a token", "draft_vocab_size"},
    "dtype is one of": {"the file's dtype"},
}
"""Rules that cannot be kept where another is broken."""
MENDS = {
    "architectures is": "write that",
    "block_size stands once": "write it at the top level or in dflash_config",
    "block_size is 2 to": "write the K that it was trained with",
    "mask_token_id is a token": "write the id that it was trained with",
    "target layer ids": "(speculators writes each plus 1)",
    "no embedding": "leave it out: the engine has the target's",
    "draft_vocab_size": "write 64",
    "sample_from_anchor": "write false",
    "speculators_config.verifier": "or export with --verifier",
    "layer_types is full": "write those that it was trained with",
    "sliding layers have a window": "and use_sliding_window true",
    "is_causal and": "into both",
    "rope_theta and": "write the target's into both",
    "rope_scaling and": "write the target's into both",
    "num_target_layers, if told": "or leave it out",
    "shapes fit": "export it anew from the run",
    "all tensors": "export it anew from the run",
    "no others": "leave them out",
    "the file's dtype": "write the file's dtype into config.json",
    "weights are finite": "export it anew from the run",
}
"""A word of each rule's mend."""
CASES = [(layout, *case) for layout in ("zlab", "speculators") for case in FAULTS[layout]] + [
    (layout, *case) for layout in ("zlab", "speculators") for case in FAULTS["both"]
]


@pytest.mark.parametrize(("layout", "changes", "rule"), CASES)
def test_each_fault_is_found_alone_with_its_mend(folders, tmp_path, layout, changes, rule):
    folder = tmp_path / "folder"
    shutil.copytree(folders / layout, folder)
    inner = {"hidden_act", "layer_types", "use_sliding_window", "rope_theta"}
    inner |= {"vocab_size", "intermediate_size", "attention_bias", "rope_scaling"}
    inner |= {"rope_parameters.rope_type", "rope_parameters.factor"}
    if layout == "speculators":
        changes = {
            f"transformer_layer_config.{key}" if key in inner else key: value
            for key, value in changes.items()
        }
    spoil(folder, changes)
    faults = [one for one in check_export(folder, read_config(folder)) if one.fault]
    assert any(one.rule.startswith(rule) for one in faults)
    known = {rule} | FOLLOWS.get(rule, set())
    others = [one.rule for one in faults if not any(one.rule.startswith(start) for start in known)]
    assert not others
    assert all(one.mend for one in faults)
    if rule in MENDS:
        assert any(MENDS[rule] in one.mend for one in faults if one.rule.startswith(rule))


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
def test_what_the_loader_takes_from_elsewhere_is_no_fault(folders, tmp_path, layout):
    folder = tmp_path / "folder"
    shutil.copytree(folders / layout, folder)
    said = json.loads((folder / "config.json").read_text())
    said["torch_dtype"] = said.pop("dtype")
    said.setdefault("dflash_config", {})["block_size"] = said.pop("block_size")
    (folder / "config.json").write_text(json.dumps(said))
    assert not [one for one in check_export(folder, read_config(folder)) if one.fault]
    assert load_drafter(str(folder)).drafter.config.block_size == 8


def test_biases_are_expected_where_the_config_has_them():
    loaded = made()
    config = DrafterConfig.from_dict(loaded.drafter.config.to_dict() | {"attention_bias": True})
    wanted = {name: tuple(one.shape) for name, one in Drafter(config).state_dict().items()}
    assert "layers.0.self_attn.k_proj.bias" in wanted
    assert expected_shapes(said_by(config.to_dict())) == wanted


def test_a_launch_line_has_a_gguf_target_as_a_file(tmp_path, capsys):
    loaded = made()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "q4.gguf").write_bytes(b"")
    loaded.target_path, loaded.target_gguf_file = str(tmp_path / "model"), "q4.gguf"
    export(loaded, tmp_path / "here")
    main(["check", str(tmp_path / "here")])
    assert f"vllm serve {tmp_path / 'model' / 'q4.gguf'} --spec" in capsys.readouterr().out
    loaded.target_path = "some/folder-GGUF"
    export(loaded, tmp_path / "away")
    main(["check", str(tmp_path / "away")])
    said = capsys.readouterr().out
    assert "vllm serve TARGET --spec" in said
    assert "\nTARGET is the file q4.gguf of some/folder-GGUF\n" in said
    (tmp_path / "away" / "provenance.json").unlink()
    main(["check", str(tmp_path / "away")])
    assert "\nTARGET is the target that it was trained with\n" in capsys.readouterr().out


def test_a_target_by_a_path_of_this_machine_is_warned_of(folders, tmp_path, capsys):
    for path in (str(tmp_path), "./runs/target", "runs/a/target"):
        loaded = made()
        loaded.target_path = path
        export(loaded, tmp_path / "out", layout="speculators")
        main(["check", str(tmp_path / "out")])
        assert f"path of this machine ({path}), which others cannot" in capsys.readouterr().out
    main(["check", str(folders / "speculators")])
    assert "warning" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    loaded = made()
    export(loaded, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    rename = Path.rename

    def refuse(self, other):
        if self.name == ".out.part":
            raise OSError("no space")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space"):
        export(loaded, tmp_path / "out", "float32")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    monkeypatch.undo()
    export(loaded, tmp_path / "out", "float32")
    assert (tmp_path / "out" / "config.json").read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_fault_ends_with_code_1_and_no_launch_line(folders, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(folders / "zlab", folder)
    spoil(folder, {"block_size": 1})
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(folder)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "fault  block_size is 2 to 64: it is 1; write the K that it was trained with" in said
    assert "vllm serve" not in said
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(folder)])
    assert stopped.value.code == 1
    assert "fault  weights are safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "config.json can't be read" in capsys.readouterr().err


def test_the_files_of_the_target_in_older_speculators_folders_are_no_fault(folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders / "speculators", folder)
    spoil(folder, {"tensors": add("lm_head.weight", torch.zeros(64, 16).bfloat16())})
    findings = check_export(folder, read_config(folder))
    assert not [one for one in findings if one.fault]
    assert any("lm_head.weight: read, then replaced" in one.rule for one in findings)


def measured(loaded):
    """A result file's content: ours on two sets, and another drafter that accepted all."""

    def row(name, accepted, reached, emitted, rounds):
        counts = dict.fromkeys(COUNTS, 1.0) | {
            "emitted": emitted,
            "rounds": rounds,
            "unclipped": emitted + 1.0,
        }
        buckets = [rounds, 0.0, 0.0, 0.0, 0.0]
        tokens = [emitted, 0.0, 0.0, 0.0, 0.0]
        return Tally(name, 0, 0, "0" * 16, 5, 9, counts, accepted, reached, buckets, tokens)

    rows = [
        row("chat", [8.0, 4.0, 1.0], [10.0, 8.0, 4.0], 23.0, 10.0),
        row("code", [5.0, 5.0, 0.0], [5.0, 5.0, 0.0], 15.0, 5.0),
    ]
    all_accepted = [row("chat", [9.0] * 3, [9.0] * 3, 36.0, 9.0)]
    one = {"name": "ours", "fingerprint": loaded.fingerprint, "block_size": 8, "search": None}
    other = {"name": "other", "fingerprint": "0" * 20, "block_size": 8}
    return summarise(
        {
            "settings": {"max_new_tokens": 96, "sampling": {"temperature": 0.0}, "seed": 0},
            "dtype": "float32",
            "target": {"path": "a/target", "fingerprint": "f"},
            "drafters": [
                one | {"responses": {"replay": [row.to_json() for row in rows]}},
                other | {"responses": {"replay": [row.to_json() for row in all_accepted]}},
            ],
            "skipped": [],
            "misfits": [],
            "command": "evaluate.py report --prompts mine.jsonl",
        },
        resamples=20,
    )


def test_measured_acceptance_goes_along_and_is_printed(tmp_path, capsys):
    loaded = made()
    (tmp_path / "result.json").write_text(json.dumps(measured(loaded)))
    export(loaded, tmp_path / "first", "float32")
    words = [str(tmp_path / "first"), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    main([*words, "--results", str(tmp_path / "result.json")])
    saved = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert saved["dtype"] == "float32"
    assert saved["settings"]["max_new_tokens"] == 96
    assert saved["target"]["path"] == "a/target"
    assert saved["command"].endswith("mine.jsonl")
    (one,) = saved["measured"]  # of the other drafter nothing
    assert one["fingerprint"] == loaded.fingerprint
    assert (one["mode"], one["block_size"]) == ("replay", 8)
    chat, code = one["sets"]["chat"], one["sets"]["code"]
    assert chat["accepted_length"]["value"] == pytest.approx(2.3)
    assert chat["accepted_length_unclipped"]["value"] == pytest.approx(2.4)
    assert [rate["value"] for rate in chat["accept_rate"]] == pytest.approx([0.8, 0.5, 0.25])
    assert code["accepted_length"]["value"] == pytest.approx(3.0)
    assert one["sets"]["average"]["accepted_length"]["value"] == pytest.approx(2.65)
    assert one["pooled"]["rounds"] == 15
    assert one["pooled"]["accepted_length"] == pytest.approx(38 / 15)
    assert one["pooled"]["accepted_length_unclipped"] == pytest.approx(40 / 15)
    assert one["pooled"]["accepted_at"] == pytest.approx([13 / 15, 9 / 15, 1 / 15])
    assert "prompts" not in saved
    capsys.readouterr()
    main(["check", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "(replay, K = 8, float32, temperature 0.0, up to 96 tokens)" in said
    assert "  chat: accepted length 2.300, last round not cut 2.400\n" in said
    assert "of rounds that reach it: 80 50 25 %" in said
    assert "of all rounds: 80 40 10 %" in said
    assert "of all rounds: 100 100 %" in said  # no round of code reached the third
    assert "all sets pooled: accepted length 2.533, last round not cut 2.667\n" in said
    assert "of all rounds: 87 60 7 %" in said
    assert said.count("of all rounds:") == 3  # a product of averages is no average
    assert "no acceptance_prompts.jsonl" in said  # none lay beside the results
    export(loaded, tmp_path / "out", "float32")  # replaced as a whole: no stale figures
    assert not (tmp_path / "out" / "acceptance.json").exists()
    (tmp_path / "out" / "acceptance.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "acceptance.json can't be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Reports; one of a tiny run on two sets, by both modes, has been made (out.json)."""
    tmp_path = tmp_path_factory.mktemp("reported")
    cli(tmp_path, trainer__max_epochs=3, model__learning_rate=5e-3, verification__every_n_epochs=0)
    turns = [{"turns": [QUESTIONS[0], QUESTIONS[1]]}, {"turns": [QUESTIONS[2]]}]
    for name, rows in (("chat", turns), ("code", [{"prompt": "Write a list."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def report(output, *words):
        words = [*words, "--output", str(tmp_path / output), "--cache-dir", str(tmp_path / "cache")]
        words += ["--max-new-tokens", "12", "--dtype", "float32", "--no-progress"]
        evaluate.main(["report", "--ckpt", str(tmp_path / "run"), *words])

    sets = [str(tmp_path / "chat.jsonl"), str(tmp_path / "code.jsonl")]
    report("out.json", "--prompts", *sets, "--mode", "both")
    return tmp_path, report


def test_the_prompts_go_along_and_repeat_the_measurement(reported, capsys, monkeypatch):
    tmp_path, _ = reported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    words = [str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    main([*words, "--results", str(tmp_path / "out.json")])
    saved = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    file = tmp_path / "out" / "acceptance_prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved["prompts"] == {"file": file.name, "lines": 4}
    assert {(row["set_name"], row["prompt_id"], row["turn"]) for row in rows} == {
        ("chat", 0, 0),
        ("chat", 0, 1),
        ("chat", 1, 0),
        ("code", 0, 0),
    }
    target = Target.load(str(find_target(tmp_path)), dtype="float32")
    answers = target.generate([row["prompt_ids"] for row in rows], 12)
    assert [row["response_ids"] for row in rows] == [one.ids for one in answers]
    assert all(target.tokenizer.encode(row["text"]) == row["prompt_ids"] for row in rows)
    replayed, _ = saved["measured"]
    assert sum(row["expected"]["rounds"] for row in rows) == replayed["pooled"]["rounds"]
    for row in rows:
        assert row["expected"]["emitted"] == len(row["response_ids"]) - 1

    capsys.readouterr()
    main(["check", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"as in {tmp_path / 'out' / 'acceptance.json'}\n" in said
    assert f"prompts: {file} (4, as token ids" in said
    assert "vllm:spec_decode_num_accepted_tokens_per_pos" in said
    (again,) = [line for line in said.splitlines() if line.startswith("  1. here: ")]
    shown = shlex.split(again.removeprefix("  1. here: "))
    assert shown[:3] == ["python", "evaluate.py", "report"]
    evaluate.main([*shown[3:], "--output", str(tmp_path / "again.json"), "--no-progress"])
    (one,) = json.loads((tmp_path / "again.json").read_text())["drafters"]
    figures = one["figures"]["replay"]["sets"]["acceptance_prompts"]
    for key in ("accepted_length", "accepted_length_unclipped"):
        assert figures[key]["value"] == pytest.approx(replayed["pooled"][key])
    assert "temperature 0.0, at most 12 tokens, nothing else" in said
    shares = [rate["value"] for rate in figures["accept_rate"]]
    assert shares[0] == pytest.approx(replayed["pooled"]["accepted_at"][0])


def test_what_is_repeated_is_one_draft_a_round_as_it_was_measured(reported, capsys):
    tmp_path, report = reported
    words = ["--prompts", str(tmp_path / "chat.jsonl"), "--temperature", "0.7", "--top-k", "20"]
    words += ["--block-size", "3", "--mode", "decode", "--search"]

    def checked(name):
        results = ["--results", str(tmp_path / f"{name}.json")]
        main([str(tmp_path / "run"), "--output", str(tmp_path / name), *results])
        capsys.readouterr()
        main(["check", str(tmp_path / name)])
        return capsys.readouterr().out

    report("ways.json", *words, "tree", "plain", "--budget", "4")
    said = checked("ways")
    assert "to repeat, of the above: decode, K = 3, one whole draft a round\n" in said
    (again,) = [line for line in said.splitlines() if line.startswith("  1. here: ")]
    assert again.endswith(" --temperature 0.7 --top-k 20 --block-size 3 --mode decode")
    assert "  2. in the engine (started with 2 speculative tokens): send" in said
    assert "prompt_ids, temperature 0.7, at most 12 tokens, top_k 20, nothing else" in said
    assert "hold them to the intervals of acceptance.json" in said
    saved = json.loads((tmp_path / "ways" / "acceptance.json").read_text())
    assert [one["search"] for one in saved["measured"]] == ["tree of 4", None]
    rows = (tmp_path / "ways" / "acceptance_prompts.jsonl").read_text().splitlines()
    rounds = sum(json.loads(row)["expected"]["rounds"] for row in rows)
    assert rounds == saved["measured"][1]["pooled"]["rounds"]

    report("tree.json", *words, "tree", "--budget", "4")
    said = checked("tree")
    assert "make the report without --search" in said
    assert "1. here" not in said


def test_prompts_of_partial_results_are_merged_or_left_out_whole(reported, capsys):
    tmp_path, report = reported
    chat = str(tmp_path / "chat.jsonl")
    for i in range(2):
        words = ["--prompts", chat, "--skip", str(i), "--limit", "1", "--mode", "decode"]
        report(f"part{i}.json", *words)
    parts = [str(tmp_path / f"part{i}.json") for i in range(2)]
    evaluate.main(["merge", *parts, "--output", str(tmp_path / "whole.json")])
    rows = (tmp_path / "whole-prompts.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert all(json.loads(row)["response_ids"] for row in rows)
    words = [str(tmp_path / "run"), "--output", str(tmp_path / "other")]
    results = ["--results", str(tmp_path / "whole.json")]
    main([*words, *results])
    assert (tmp_path / "other" / "acceptance_prompts.jsonl").exists()
    (tmp_path / "whole-prompts.jsonl").write_text("".join(f"{row}\n" for row in rows[1:]))
    main([*words, *results])
    assert not (tmp_path / "other" / "acceptance_prompts.jsonl").exists()
    assert "prompts" not in json.loads((tmp_path / "other" / "acceptance.json").read_text())
    assert "do not have all their prompts beside them" in capsys.readouterr().out
    (tmp_path / "whole-prompts.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        main([*words, *results])
    assert stopped.value.code == 2
    assert "whole-prompts.jsonl can't be read" in capsys.readouterr().err
    (tmp_path / "whole-prompts.jsonl").write_text(f"{rows[0]}\n")
    (tmp_path / "part1-prompts.jsonl").unlink()
    (tmp_path / "part0-prompts.jsonl").unlink()  # as an older version leaves them
    evaluate.main(["merge", *parts, "--output", str(tmp_path / "whole.json")])
    assert not (tmp_path / "whole-prompts.jsonl").exists()
