"""Looks at every byte of a feature cache, and builds anew what is damaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from data.cache_build import Builder, CacheSettings, differences
from data.cache_format import MANIFEST, Manifest, check_shard, file_sha256, read_manifest
from data.stored_target import StoredTarget
from drafter.errors import UserError


def faults(folder: Path, manifest: Manifest, progress: bool = True) -> dict[str, str]:
    """Returns what is wrong by file, after reading every byte of the cache."""
    found: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        checks = pool.map(partial(check_shard, folder, thorough=True), manifest.shards)
        bar = tqdm(
            checks, total=len(manifest.shards), desc="verify", unit="shard", disable=not progress
        )
        for shard, fault in zip(manifest.shards, bar, strict=True):
            if fault:
                found[shard.file] = fault
    for name, digest in manifest.frozen.items():
        path = folder / StoredTarget.FOLDER / name
        if not path.exists():
            found[name] = f"{path} is missing"
        elif file_sha256(path) != digest:
            found[name] = f"{path} is not what was written: its sha256 differs"
    return found


def repair(folder: Path, device: str, progress: bool = True) -> list[str]:
    """Builds anew what is damaged, and nothing else; returns the names of those files."""
    manifest = read_manifest(folder)
    damaged = faults(folder, manifest, progress)
    if not damaged:
        return []
    names = {f.name for f in fields(CacheSettings)}
    stored = manifest.identity["settings"]
    builder = Builder(
        CacheSettings(**{name: stored[name] for name in names & stored.keys()}),
        folder,
        device=device,
        progress=progress,
    )
    differing = differences(manifest.identity, builder.identity)
    if differing:
        raise UserError(
            f"{folder} can't be repaired: what it was made of has changed ({'; '.join(differing)})."
        )
    (folder / MANIFEST).unlink()
    for shard in manifest.shards:
        if shard.file in damaged:
            (folder / shard.file).unlink(missing_ok=True)
            (folder / shard.file).with_suffix(".json").unlink(missing_ok=True)
    builder.run()
    return sorted(damaged)
