"""Bad input is one clear sentence that names the file and the line, never fewer rows."""

from __future__ import annotations

import json

import pytest

from data.conversations import check_tokenizer_fits
from drafter.errors import UserError
from tests.data_files import load, pair, write_rows
from tests.data_templates import byte_bpe, chatml

BAD_LINES = {
    "not JSON": ('{"prompt": "a", ', "line 3: not valid JSON"),
    "not an object": ("[1, 2]", "line 3: a row must be an object"),
    "no known field": (
        '{"text": "hello"}',
        r"line 3: cannot tell what the row holds \(fields: text",
    ),
    "no messages": ('{"messages": []}', "line 3: messages must be a list"),
    "a message of text": ('{"messages": ["hello"]}', r"line 3: messages\[0\]: a message must be"),
    "a message without role": ('{"messages": [{"content": "x"}]}', "needs role and content"),
    "unknown speaker": (
        '{"conversations": [{"from": "dog", "value": "x"}]}',
        r"line 3: conversations\[0\]: unknown speaker 'dog'",
    ),
    "number as content": ('{"messages": [{"role": "user", "content": 5}]}', "content must be text"),
    "text as ids": (
        '{"prompt_ids": "12", "response_ids": [1]}',
        "line 3: prompt_ids must be a list of token ids",
    ),
    "fraction as id": ('{"prompt_ids": [1.5], "response_ids": [1]}', "prompt_ids must be a list"),
    "id too large": (
        '{"prompt_ids": [1], "response_ids": [2, 400]}',
        "line 3: token id 400 is outside the target's vocabulary of 400",
    ),
    "negative id": ('{"prompt_ids": [], "response_ids": [-1, 2]}', "response_ids must be a list"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, kind):
    line, message = BAD_LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(pair(0))}\n\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(pair(0)).encode() + b'\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load(str(path))


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "parquet.gz", "parquet"])
def test_a_file_cut_short_is_an_error_not_fewer_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    write_rows(path, [{"prompt": f"{i**9}", "response": f"{i**11}"} for i in range(300)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"rows\..*(cut short or damaged|not a readable parquet)"):
        load(str(path))


def test_a_json_list_names_the_line_it_breaks_at(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a", "response": "b"},\n{"prompt" "a"}\n]')
    with pytest.raises(UserError, match=r"rows\.json, line 3: not valid JSON"):
        load(str(path))


def test_missing_and_unknown_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        load(str(tmp_path / "no.jsonl"))
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        load("no.jsonl")  # a relative path is no hub id
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"rows\.csv: not one of"):
        load(str(tmp_path / "rows.csv"))
    with pytest.raises(UserError, match=r"no \.jsonl"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="empty"):
        load([])


def test_a_context_longer_than_the_target_allows(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "response": "the " * 60}])
    with pytest.raises(UserError, match=r"max_length is 300, but the target's context is 200"):
        load(source, max_length=300, target_max_length=200)
    with pytest.raises(
        UserError, match=r"line 1: \d+ tokens, more than the target's context of 64"
    ):
        load(source, max_length=None, target_max_length=64)


def test_an_absent_chat_template_is_one_sentence(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [pair(0)])
    with pytest.raises(UserError, match="has no chat template"):
        load(source, byte_bpe(None, eos="<|im_end|>"))


def test_a_tokenizer_that_does_not_fit_the_target(caplog):
    tokenizer = chatml()
    base = max(i for i in tokenizer.get_vocab().values() if i not in tokenizer.added_tokens_decoder)
    added = max(tokenizer.added_tokens_decoder)
    assert added > base
    check_tokenizer_fits(tokenizer, added + 1)
    assert not caplog.records
    check_tokenizer_fits(tokenizer, base + 1)  # as Gemma 3 1B: only added tokens lie beyond
    assert str(added) in caplog.text
    with pytest.raises(UserError, match=f"gives ids up to {base}, but .* has {base} rows"):
        check_tokenizer_fits(tokenizer, base)


def test_a_row_with_an_added_token_beyond_the_embedding_is_refused(tmp_path):
    tokenizer = chatml()
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "</tool_call>", "response": "a b"}])
    with pytest.raises(UserError, match=r"line 1: token id \d+ is outside"):
        load(source, tokenizer, vocab_size=tokenizer.convert_tokens_to_ids("</tool_call>"))


def test_a_hub_id_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"org/none: no such file, and `datasets` cannot load it"):
        load("org/none")
