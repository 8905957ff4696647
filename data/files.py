"""Which files are read."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet")


def file_suffix(path: Path) -> str | None:
    """Returns which of `SUFFIXES` the file has, whether or not .gz follows; None for another."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".settings.json"):  # what data/regenerate.py lays beside its output
        return None
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def readable_files(folder: Path) -> list[Path]:
    """Returns the files of `SUFFIXES` in a folder in sorted order; none if there is no folder."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in inside if file.is_file() and file_suffix(file))
