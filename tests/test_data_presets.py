"""Public data sets by name: each one's own columns give the conversation that they mean."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from data.cache_build import Builder, CacheSettings
from data.conversations import load_rows
from data.formats import parse
from data.online import OnlineHiddenStates
from data.overlap import overlap_with_runs, training_texts
from data.presets import PRESETS, parse_preset
from data.prompt_sets import load_prompts
from data.regenerate import main as regenerate
from data.sources import Source, check_names
from drafter.errors import UserError
from tests.data_files import VOCAB, load, write_rows
from tests.data_templates import CALL_ONLY, assistant, byte_bpe, chatml, user
from tests.tiny import tiny_target_dir

SYSTEM = {"role": "system", "content": "Be short."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1}'},
}


def said(speaker, text):
    return {"from": speaker, "value": text}


def nemotron(*messages, **columns):
    head = {"uuid": "u", "license": "cc-by-4.0", "generator": "g", "version": "v1"}
    return {**head, "category": "chat", "reasoning": "off", "messages": list(messages), **columns}


# preset, a row with the data set's own columns, the messages it means (None: it says nothing)
ROWS = {
    "sharegpt": (
        "sharegpt",
        {"id": "a_0", "conversations": [said("human", "hello"), said("gpt", "you")]},
        [user("hello"), assistant("you")],
    ),
    "sharegpt, other speakers": (
        "sharegpt",
        {"id": "a", "conversations": [said("system", "Be short."), said("user", "a"),
                                      said("chatgpt", "b"), said("human", "c"), said("bing", "d")]},
        [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")],
    ),
    "sharegpt, cut before an answer": (
        "sharegpt",
        {"id": "a_2", "conversations": [said("gpt", "of before"), said("human", "hello"),
                                        said("gpt", "you")]},
        [user("hello"), assistant("you")],
    ),
    "sharegpt, an answer alone": (
        "sharegpt", {"id": "a", "conversations": [said("gpt", "of before")]}, None,
    ),
    "sharegpt, empty": ("sharegpt", {"id": "a", "conversations": []}, None),
    "ultrachat": (
        "ultrachat",
        {"prompt": "hello", "prompt_id": "f0e3", "messages": [
            user("hello"), assistant("you"), user("today"), assistant("the answer")]},
        [user("hello"), assistant("you"), user("today"), assistant("the answer")],
    ),
    "ultrachat, a system turn": (
        "ultrachat",
        {"prompt": "hello", "prompt_id": "f", "messages": [
            SYSTEM, user("hello"), assistant("you")]},
        [SYSTEM, user("hello"), assistant("you")],
    ),
    "nemotron-v1, tool calls that are none": (
        "nemotron-v1",
        nemotron({**user("hello"), "tool_calls": []}, assistant("you", tool_calls=[]),
                 metadata='{"conversation_id": 1}'),
        [user("hello"), assistant("you")],
    ),
    "nemotron-v1, tools": (
        "nemotron-v1",
        nemotron(user("add"), assistant("", tool_calls=[CALL]),
                 metadata=json.dumps({"tools": [TOOL]})),
        [user("add"), assistant("", tool_calls=[CALL])],
    ),
    "nemotron-v2, an empty system turn": (
        "nemotron-v2",
        nemotron({"role": "system", "content": ""}, user("hello"), assistant("you")),
        [user("hello"), assistant("you")],
    ),
    "nemotron-v2, a system turn of blanks": (
        "nemotron-v2",
        nemotron({"role": "system", "content": " \n"}, user("hello"), assistant("you")),
        [user("hello"), assistant("you")],
    ),
    "nemotron-v2, a system turn and a thought": (
        "nemotron-v2",
        nemotron(SYSTEM, user("hello"), assistant("<think>\nhm\n</think>\n\nyou"), reasoning="on"),
        [SYSTEM, user("hello"), assistant("<think>\nhm\n</think>\n\nyou")],
    ),
    "codealpaca": (
        "codealpaca",
        {"instruction": "add", "input": "1 and 2", "output": "it is 3"},
        [user("add\n\n1 and 2"), assistant("it is 3")],
    ),
    "codealpaca, no input": (
        "codealpaca",
        {"instruction": "count", "input": "", "output": "1, 2"},
        [user("count"), assistant("1, 2")],
    ),
    "perfectblend": (
        "perfectblend",
        {"conversations": [said("human", "hello"), said("gpt", "you")], "source": "meta-math"},
        [user("hello"), assistant("you")],
    ),
    "perfectblend, a system turn": (
        "perfectblend",
        {"conversations": [said("system", "Be short."), said("human", "a"), said("gpt", "b")],
         "source": "ultra"},
        [SYSTEM, user("a"), assistant("b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_the_columns_of_a_preset_give_the_conversation_they_mean(tmp_path, case):
    name, columns, expected = ROWS[case]
    write_rows(tmp_path / "rows.jsonl.gz", [columns])
    row = next(Source(f"preset:{name}={tmp_path}").rows())
    assert "rows.jsonl.gz, line 1" in row.where
    if expected is None:
        assert not row.asks
    else:
        conversation = parse(row)
        assert conversation.messages == expected
        assert conversation.tools == ([TOOL] if case == "nemotron-v1, tools" else None)


def test_every_preset_has_a_row_here():
    assert {name for name, _, _ in ROWS.values()} == set(PRESETS)


@pytest.mark.parametrize("kind", ["parquet", "json", "json.gz"])
def test_a_preset_s_copy_gives_the_tokens_of_its_messages(tmp_path, kind):
    write_rows(tmp_path / f"part.{kind}", [ROWS["sharegpt"][1], ROWS["sharegpt, empty"][1]])
    tokenizer = chatml()
    found = load(f"preset:sharegpt={tmp_path}", tokenizer)
    served = tokenizer.apply_chat_template(ROWS["sharegpt"][2])["input_ids"]
    assert [row.input_ids.tolist() for row in found] == [served]
    assert (found.report.read, found.report.kept) == (2, 1)


def test_empty_tool_calls_do_not_make_a_template_refuse_the_row(tmp_path):
    # as Llama 3.2's: any tool_calls but exactly one is refused
    strict = CALL_ONLY.replace(
        "{% if message.tool_calls %}",
        "{% if 'tool_calls' in message and message.tool_calls | length != 1 %}"
        "{{ raise_exception('single tool-calls only') }}{% endif %}{% if message.tool_calls %}",
    )
    assert strict != CALL_ONLY
    row = ROWS["nemotron-v1, tool calls that are none"][1]
    source = write_rows(tmp_path / "chat-0.jsonl", [row])
    tokenizer = byte_bpe(strict, eos="<|eot_id|>")
    assert len(load(f"preset:nemotron-v1={source}", tokenizer)) == 1
    with pytest.raises(UserError, match="single tool-calls"):
        load(source, tokenizer)


def test_a_folder_laid_out_as_on_the_hub_gives_the_files_of_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train_sft", "test_sft"):
        row = {"prompt": "a", "prompt_id": "f", "messages": [user(split), assistant("you")]}
        write_rows(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [row])

    def asked(source):
        return [parse(row).messages[0]["content"] for row in Source(source).rows()]

    assert asked(f"preset:ultrachat={tmp_path}") == ["train_sft"]
    assert asked(f"preset:ultrachat/test_sft={tmp_path}") == ["test_sft"]
    (tmp_path / "dataset_infos.json").write_text("{}")  # beside data/, and no data
    assert asked(f"preset:ultrachat={tmp_path}") == ["train_sft"]
    there = r"begins with 'train_gen' \(splits there: test_sft, train_sft\); preset:ultrachat=FILE"
    with pytest.raises(UserError, match=there):
        asked(f"preset:ultrachat/train_gen={tmp_path}")
    (tmp_path / "data" / "train_sft-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"begins with 'train_sft' \(splits there: test_sft\)"):
        asked(f"preset:ultrachat={tmp_path}")  # not the rows of another split


def test_a_copy_s_files_are_those_that_the_hub_has_for_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    for begins in ("chat", "tool"):
        write_rows(tmp_path / "data" / f"{begins}-00000-of-00001.jsonl", [nemotron(user(begins))])
    with pytest.raises(UserError, match="splits there: chat, tool_calling"):
        Source(f"preset:nemotron-v1/math={tmp_path}").files()
    assert [
        path.name for path in Source(f"preset:nemotron-v1/tool_calling={tmp_path}").files()
    ] == ["tool-00000-of-00001.jsonl"]


def test_of_a_copy_with_two_files_only_the_data_set_is_read(tmp_path):
    ours = PRESETS["sharegpt"].data_files
    for name in (ours, "ShareGPT_2023.05.04v0_Wasteland_Edition.json"):
        write_rows(tmp_path / name, [ROWS["sharegpt"][1]])
    assert Source(f"preset:sharegpt={tmp_path}").files() == [tmp_path / ours]


@pytest.mark.parametrize("metadata", [{"tools": [TOOL]}, json.dumps({"tools": [TOOL]})])
def test_metadata_may_be_an_object_already(tmp_path, metadata):
    row = nemotron(user("add"), assistant("3"), metadata=metadata)
    source = write_rows(tmp_path / "a.jsonl", [row, nemotron(user("a"), metadata=[1])])
    tools = [parse(row).tools for row in Source(f"preset:nemotron-v1={source}").rows()]
    assert tools == [[TOOL], None]


def test_a_row_without_question_is_counted_as_such(tmp_path):
    rows = [ROWS[case][1] for case in ("sharegpt", "sharegpt, an answer alone", "sharegpt, empty")]
    silent = {"id": "b", "conversations": [said("human", "hello"), said("gpt", "")]}
    report = load(f"preset:sharegpt={write_rows(tmp_path / 'a.jsonl', [*rows, silent])}").report
    assert {reason: tally.count for reason, tally in report.left_out.items()} == {
        "no question": 2,
        "empty response": 1,
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", ["sharegpt", "nemotron-v2, an empty system turn"])
def test_a_preset_is_asked_of_the_hub_with_its_split(tmp_path, monkeypatch, case, streaming):
    import datasets

    name, columns, _ = ROWS[case]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        rows = datasets.Dataset.from_list([columns] * 5)
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load(f"preset:{name}", streaming=streaming, skip=1, limit=3, cache_dir=tmp_path)
    assert [row.sample_id for row in found] == [1, 2, 3]
    (args, kwargs) = asked[0]
    preset = PRESETS[name]
    assert args == (preset.hub_id, None)
    assert kwargs["split"] == preset.split
    # of Nemotron's 100 GB `datasets` would else download every split
    assert kwargs["streaming"] is (streaming or name == "nemotron-v2")
    assert ("data_files" in kwargs) is (name == "sharegpt")
    next(Source(f"preset:{name}/code").rows())
    assert asked[-1][1]["split"] == "code"


def test_presets_and_files_follow_one_another_in_a_list(tmp_path, monkeypatch):
    import datasets

    own = write_rows(tmp_path / "own.jsonl", [{"prompt": "own", "response": "you"}])
    alpaca = write_rows(tmp_path / "code.json", [ROWS["codealpaca"][1]])
    chats = datasets.Dataset.from_list([ROWS["ultrachat"][1]] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: chats)
    source = ["preset:ultrachat", f"preset:codealpaca={alpaca}", own]
    found = load(source)
    assert [row.sample_id for row in found] == [0, 1, 2, 3]
    assert "1 and 2" in chatml().decode(found[2].input_ids)
    assert [row.sample_id for row in load(source, skip=2)] == [2, 3]
    assert [row.sample_id for row in load(source, skip=1, limit=2)] == [1, 2]


def test_stored_tokens_belong_to_the_local_copy_and_to_the_preset(tmp_path):
    path, row = tmp_path / "rows.jsonl", ROWS["sharegpt, cut before an answer"][1]
    options = {"streaming": True, "cache_dir": tmp_path / "cache"}
    write_rows(path, [row])
    (preset,) = load(f"preset:sharegpt={path}", **options)
    (plain,) = load(str(path), **options)  # the same file, read as it is: an answer comes first
    assert len(plain.input_ids) > len(preset.input_ids)
    write_rows(path, [row] * 2)
    assert len(load(f"preset:sharegpt={path}", **options)) == 2


def test_stored_tokens_tell_which_file_of_a_list_is_the_preset_s(tmp_path):
    row = ROWS["sharegpt, cut before an answer"][1]
    a, b = (write_rows(tmp_path / f"{name}.jsonl", [row]) for name in "ab")
    options = {"streaming": True, "cache_dir": tmp_path / "cache"}
    lists = [f"preset:sharegpt={a}", b], [a, f"preset:sharegpt={b}"]
    one, two = ([len(row.input_ids) for row in load(source, **options)] for source in lists)
    assert one == two[::-1]
    assert one[0] < one[1]


def test_stored_tokens_are_made_anew_when_presets_are_read_otherwise(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "a.jsonl", [ROWS["sharegpt"][1]])
    options = {"streaming": True, "cache_dir": tmp_path / "cache"}
    for reading in (1, 1, 2):
        monkeypatch.setattr("data.presets.READING", reading)
        load(f"preset:sharegpt={source}", **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_training_texts_are_the_preset_s_messages(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [ROWS["sharegpt, cut before an answer"][1]])
    assert list(training_texts(f"preset:sharegpt={tmp_path}", chatml())) == ["hello\nyou"]


def test_a_malformed_row_does_not_end_the_search_for_overlap(tmp_path):
    bad = {"messages": [{"role": "user", "content": {"x": 1}}]}
    rows = [bad, ROWS["ultrachat"][1]]
    source = f"preset:ultrachat={write_rows(tmp_path / 'a.jsonl', rows)}"
    assert list(training_texts(source, chatml())) == ["hello\nyou\ntoday\nthe answer"]
    with pytest.raises(UserError, match=r"line 1: messages\[0\]: content must be text"):
        load(source)


def test_the_prompts_of_a_preset_can_be_answered(tmp_path, capsys):
    alone, asked = ROWS["sharegpt, an answer alone"][1], ROWS["sharegpt, cut before an answer"][1]
    source = f"preset:sharegpt={write_rows(tmp_path / 'a.jsonl', [alone, asked])}"
    out = tmp_path / "out.jsonl"
    flags = ["--target", str(tiny_target_dir(tmp_path)), "--max-new-tokens", "2"]
    regenerate([*flags, "--prompts", source, "--output", str(out)])
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["set"], line["id"], line["prompt"]) == ("sharegpt", 1, "hello")
    assert "left out: 1 rows, the first because " in capsys.readouterr().out
    with pytest.raises(UserError, match="no question"):
        load_prompts(source, chatml())


def test_a_preset_s_local_copy_is_searched_for_benchmark_prompts(tmp_path):
    question = "how many of the words in this very long question are also in the training rows"
    source = write_rows(
        tmp_path / "a.jsonl", [{"instruction": question, "input": "", "output": "1"}]
    )
    prompts = [SimpleNamespace(set_name="s", turns=(question,), text=question)]
    for where, told in ((f"={source}", 1), ("", "not files on this machine")):
        (tmp_path / "config.yaml").write_text(f"data: {{train_data: 'preset:codealpaca{where}'}}")
        drafter = SimpleNamespace(name="d", run_config=tmp_path / "config.yaml")
        found = overlap_with_runs([drafter], prompts, chatml())["d"]
        assert told in found if isinstance(told, str) else found["s"]["shared"] == told


def test_an_unknown_name_is_one_sentence_with_the_presets():
    with pytest.raises(UserError) as error:
        load_rows("preset:ultrachta", chatml(), vocab_size=VOCAB, max_length=9)
    names = "codealpaca, nemotron-v1, nemotron-v2, perfectblend, sharegpt, ultrachat"
    assert str(error.value) == (
        f"preset:ultrachta: no preset is called 'ultrachta'; choose one of {names} "
        "(a local file so called is read as ./preset:ultrachta)"
    )


def test_the_split_of_a_hub_data_set_may_stand_beside_a_preset(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*_, **kwargs):
        asked.append(kwargs["split"])
        return datasets.Dataset.from_list([ROWS["ultrachat"][1]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_names(("preset:ultrachat", "org/x"), "test")
    for source in ("preset:ultrachat", "org/x"):
        load(source, split="test")
    assert asked == ["train_sft", "test"]


def test_what_a_user_gets_wrong_about_a_preset_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no path after '='"):
        parse_preset("preset:ultrachat=")
    with pytest.raises(UserError, match=r"download HuggingFaceH4/ultrachat_200k into it"):
        load(f"preset:ultrachat={tmp_path / 'none'}")
    with pytest.raises(UserError, match=r"is no split; a local copy is preset:ultrachat=/data, "):
        parse_preset("preset:ultrachat//data")
    with pytest.raises(UserError, match="org/x: no such file or folder; a hub id must stand alone"):
        load(["preset:ultrachat", "org/x"])
    data = OnlineHiddenStates(
        target="./none", train_data="preset:ultrachat", train_split="test_sft"
    )
    with pytest.raises(UserError, match=r"write it as preset:ultrachat/test_sft"):
        data.setup("fit")
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "hello"}])
    with pytest.raises(UserError, match=r"line 1: no column messages.*are: text.*ultrachat_200k\?"):
        load(f"preset:ultrachat={source}")
    data = OnlineHiddenStates(target="./none", train_data=source, val_data="preset:ultra")
    with pytest.raises(UserError, match="no preset is called 'ultra'"):  # before the target loads
        data.setup("fit")
    with pytest.raises(UserError, match="no preset is called 'ultra'"):
        Builder(CacheSettings("./none", "preset:ultra"), tmp_path / "cache")
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"=PATH after preset:ultrachat reads a copy.*no network"):
        load("preset:ultrachat")
