"""CachedHiddenStates: the same batches as OnlineHiddenStates, their features read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.cache_format import HELD_OUT, TRAIN, CachedRows, Manifest, read_manifest
from data.online import OnlineHiddenStates
from data.render import fingerprint
from data.rows import RowReport, RowSet
from data.stored_target import StoredTarget
from drafter.errors import UserError
from drafter.files import file_stamp


class CachedHiddenStates(OnlineHiddenStates):
    """`OnlineHiddenStates` with a cache: `OnlineHiddenStates(cache=...)` is the same.

    Args:
        cache: Folder of a finished cache (`python -m data.cache build`).
        **settings: Of `OnlineHiddenStates`; rows and target are the cache's.
    """

    def __init__(self, cache: str, **settings: Any) -> None:
        super().__init__(cache=cache, **settings)


@dataclass
class OpenCache:
    """A cache that fits a run.

    Attributes:
        manifest: What it was made of.
        target: Its frozen parts, in the target's place.
        train: Training rows.
        held_out: Held-out rows, or None.
    """

    manifest: Manifest
    target: StoredTarget
    train: RowSet
    held_out: RowSet | None


def open_cache(
    folder: Path,
    device: str | torch.device,
    *,
    target: str = "",
    target_dtype: str = "auto",
) -> OpenCache:
    """Opens a cache for a run.

    Args:
        folder: Of the cache.
        device: Where its frozen parts go.
        target: The run's, if it names one: the cache must be of it.
        target_dtype: Likewise.

    Raises:
        UserError: It is half-built, damaged, or of another target, tokenizer, template or dtype.
    """
    manifest = read_manifest(folder)
    said = manifest.identity["target"]
    if target and not same_file(target, said["path"]):
        raise UserError(
            f"the cache {folder} was built from the target {said['path']}, this run names "
            f"{target}; give the run that target, or build a cache of this one."
        )
    stamp = file_stamp(said["path"]) if Path(said["path"]).exists() else said["stamp"]
    if stamp != said["stamp"]:
        raise UserError(
            f"the target {said['path']} has changed since the cache {folder} was built from it; "
            "build the cache anew."
        )
    if target_dtype not in ("auto", said["dtype"]):
        raise UserError(
            f"the cache {folder} was built with the target in {said['dtype']}, this run asks for "
            f"target_dtype {target_dtype}; give the run the same, or build the cache anew."
        )
    stored = StoredTarget(folder, device)
    now = fingerprint(stored.tokenizer)
    for name, value in now.items():
        if manifest.identity[name] != value:
            raise UserError(
                f"the cache {folder} was built with another {name.replace('_', ' ')} than lies in "
                f"{folder / StoredTarget.FOLDER}; build it anew."
            )
    parts = {
        name: RowSet(
            CachedRows(folder, manifest.part(name)), RowReport.from_dict(manifest.report[name])
        )
        for name in (TRAIN, HELD_OUT)
        if manifest.part(name)
    }
    return OpenCache(manifest, stored, parts[TRAIN], parts.get(HELD_OUT))


def same_file(a: str, b: str) -> bool:
    """Returns whether two names mean one target: equal, one place, or the same content."""
    if a == b:
        return True
    there = Path(a).exists() and Path(b).exists()
    return there and (Path(a).resolve() == Path(b).resolve() or file_stamp(a) == file_stamp(b))
