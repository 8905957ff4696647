"""Writes source files of every kind and loads them with the small tokenizer."""

from __future__ import annotations

import gzip
import io
import json

from data.conversations import load_rows
from tests.data_templates import chatml

VOCAB = 400


def write_rows(path, rows):
    """Writes rows the way the file's name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        content = buffer.getvalue()
    elif name.endswith(".json"):
        content = json.dumps(rows, indent=1).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def load(source, tokenizer=None, **kwargs):
    options = {"vocab_size": VOCAB, "max_length": 200, "progress": False, **kwargs}
    return load_rows(source, tokenizer or chatml(), **options)


def pair(i):
    return {"prompt": f"question {i}", "response": f"the answer is {i}."}
