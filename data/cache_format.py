"""The files of a feature cache: shards of ragged rows, what is said of each, and reading them.

A cache is a folder with

    manifest.json             what it was made of and of what shards it consists; written last
    shard-00000.safetensors   hidden_states (T, L*D), input_ids (I,), supervised (I,), sample_ids
                              (R,), and where rows begin: feature_offsets, token_offsets (R+1,);
                              last_hidden (U, D) and last_offsets (R+1,) if it was asked for
    shard-00000.json          its rows, tokens, bytes and sha256; written after it
    replay-00000.safetensors  as a shard: the held-out trajectories' features
    target/                   embedding, head and norm of the target, its config and tokenizer
    trajectories/             the target's responses to held-out prompts

Features are kept for positions 0 up to the one before a row's last possible anchor: no block sees
more. A shard is written aside, flushed and renamed, so that one that is there is whole.

Legend: R rows of a shard, T kept positions, I tokens, U positions with last_hidden, L tapped
layers, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.rows import TokenRow
from drafter.blocks import candidates
from drafter.errors import UserError
from drafter.files import write_atomic

FORMAT = 1
MANIFEST = "manifest.json"
TRAIN, HELD_OUT, REPLAY = "train", "held_out", "replay"


@dataclass(frozen=True)
class Shard:
    """What is said of a shard.

    Attributes:
        file: Its name.
        part: `train`, `held_out` or `replay`.
        first: Place of its first row in the part.
        rows: R.
        positions: T, kept positions.
        tokens: I.
        bytes: Size of the file.
        sha256: Of the file.
        scored: Tokens that a slot may have to predict.
        argmax_equal: Those of them that are the target's own argmax.
    """

    file: str
    part: str
    first: int
    rows: int
    positions: int
    tokens: int
    bytes: int
    sha256: str
    scored: int = 0
    argmax_equal: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a cache was made of.

    Attributes:
        identity: Everything that the features depend on, plain values: see `data.cache_build`.
        shards: In order.
        report: What became of the rows of the source, as `RowReport.to_dict`, by part.
        frozen: sha256 by name of the files in `target/`.
        seconds: Spent building it, over all processes.
    """

    identity: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def part(self, name: str) -> list[Shard]:
        """Returns the shards of a part, in order."""
        return [shard for shard in self.shards if shard.part == name]

    @property
    def argmax_share(self) -> float:
        """Share of scored tokens that are the target's own argmax; nan if none is scored."""
        scored = sum(shard.scored for shard in self.shards)
        equal = sum(shard.argmax_equal for shard in self.shards)
        return equal / scored if scored else float("nan")

    def write(self, folder: Path) -> None:
        """Writes manifest.json."""
        content = {"format": FORMAT, "argmax_share": self.argmax_share, **asdict(self)}
        write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Returns a finished cache's manifest.

    Raises:
        UserError: There is none, it is half-built, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        if any(folder.glob("shard-*")) or (folder / "plan.json").exists():
            raise UserError(
                f"{folder} holds a half-built cache: run the `python -m data.cache build` that "
                "began it again, and it goes on where it was."
            ) from error
        raise UserError(f"{folder} is not a feature cache: there is no {MANIFEST}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the same build again.") from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} is of format {content.get('format')}, this version reads {FORMAT}; build the "
            "cache anew."
        )
    return Manifest(
        content["identity"],
        tuple(Shard(**shard) for shard in content["shards"]),
        content["report"],
        content["frozen"],
        content["seconds"],
    )


def kept_positions(row: TokenRow) -> int:
    """Returns how many positions of a row have features: up to the one before its last anchor."""
    return int(candidates(row.supervised)[-1])


def last_positions(row: TokenRow) -> int:
    """Returns how many positions have last_hidden: up to the one before its last slot's label."""
    return int(np.flatnonzero(row.supervised)[-1])


def write_shard(
    path: Path,
    rows: Sequence[TokenRow],
    hidden_states: Sequence[Tensor],
    last_hidden: Sequence[Tensor] | None,
) -> None:
    """Writes rows and their features: aside, flushed, renamed.

    The caller holds the shard's lock, if several processes may write it.

    Args:
        path: Of the shard.
        rows: R of them.
        hidden_states: For each row (kept, L*D).
        last_hidden: For each row (kept, D), or None.
    """
    from safetensors.torch import save_file

    from drafter.files import replace_atomic

    tensors = {
        "hidden_states": torch.cat(list(hidden_states)),
        "feature_offsets": _offsets(map(len, hidden_states)),
        "input_ids": torch.from_numpy(np.concatenate([row.input_ids for row in rows])),
        "supervised": torch.from_numpy(np.concatenate([row.supervised for row in rows])),
        "token_offsets": _offsets(len(row.input_ids) for row in rows),
        "sample_ids": torch.tensor([row.sample_id for row in rows], dtype=torch.int64),
    }
    if last_hidden is not None:
        tensors["last_hidden"] = torch.cat(list(last_hidden))
        tensors["last_offsets"] = _offsets(map(len, last_hidden))
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)  # of a process that was killed: this one holds the lock
    replace_atomic(path, lambda aside: save_file(tensors, aside))


def _offsets(lengths: Any) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(folder: Path, shard: Shard, *, thorough: bool = False) -> str | None:
    """Returns what is wrong with a shard, or None.

    Args:
        folder: Of the cache.
        shard: What is said of it.
        thorough: Also read every byte; else only that it is there, in full, and adds up.
    """
    path = folder / shard.file
    if not path.exists():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{path} has {size} of {shard.bytes} bytes"
    if thorough and file_sha256(path) != shard.sha256:
        return f"{path} is not what was written: its sha256 differs"
    try:
        _OpenShard(path, shard)
    except UserError as error:
        return str(error)
    return None


class _OpenShard:
    """A shard's offsets in memory, and handles to the rest.

    Raises:
        UserError: Its rows of ids, states and mask don't go together.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self.file = safe_open(path, framework="pt")
            names = set(self.file.keys())
            self.features, self.tokens, self.sample_ids = (
                self.file.get_tensor(name)
                for name in ("feature_offsets", "token_offsets", "sample_ids")
            )
            self.last = self.file.get_tensor("last_offsets") if "last_hidden" in names else None
            lengths = {
                "hidden_states": (self._length("hidden_states"), int(self.features[-1])),
                "input_ids": (self._length("input_ids"), int(self.tokens[-1])),
                "supervised": (self._length("supervised"), int(self.tokens[-1])),
                "rows": (len(self.sample_ids), shard.rows),
                "feature rows": (len(self.features) - 1, shard.rows),
                "token rows": (len(self.tokens) - 1, shard.rows),
            }
        except (OSError, SafetensorError, IndexError) as error:
            raise UserError(f"{path} can't be read: {error}") from error
        wrong = [f"{name} {a}, not {b}" for name, (a, b) in lengths.items() if a != b]
        if wrong:
            raise UserError(f"{path}: its parts differ in length ({'; '.join(wrong)})")

    def _length(self, name: str) -> int:
        return int(self.file.get_slice(name).get_shape()[0])


class CachedRows(Sequence[TokenRow]):
    """The rows of a part, with their features; each is read by its range when asked for.

    Args:
        folder: Of the cache.
        shards: Of one part, in order.

    Raises:
        UserError: A shard is missing, cut short, or its parts don't go together.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._ends = list(accumulate(shard.rows for shard in shards))
        self._opened: dict[int, _OpenShard] = {}
        for shard in shards:
            fault = check_shard(folder, shard)
            if fault:
                raise UserError(
                    f"{fault}; `python -m data.cache repair {folder}` makes that shard anew."
                )

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Returns a `TokenRow`, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._find(index)
        span = slice(int(shard.tokens[row]), int(shard.tokens[row + 1]))
        return TokenRow(
            int(shard.sample_ids[row]),
            shard.file.get_slice("input_ids")[span].numpy(),
            shard.file.get_slice("supervised")[span].numpy(),
        )

    def tokens(self, index: int) -> int:
        """Returns a row's length."""
        shard, row = self._find(index)
        return int(shard.tokens[row + 1] - shard.tokens[row])

    def hidden_states(self, index: int) -> Tensor:
        """Returns a row's features (kept positions, L*D), in the cache's dtype."""
        shard, row = self._find(index)
        span = slice(int(shard.features[row]), int(shard.features[row + 1]))
        states: Tensor = shard.file.get_slice("hidden_states")[span]
        return states

    def last_hidden(self, index: int) -> Tensor:
        """Returns a row's last_hidden (kept positions, D).

        Raises:
            UserError: The cache was built without it.
        """
        shard, row = self._find(index)
        if shard.last is None:
            raise UserError(
                f"{self._folder} was built without last_hidden, which a loss of this run reads: "
                "build it with --last_hidden true, or leave out the terms that read the target's "
                "distribution (model.loss.alpha_kl; ForwardKL, ReverseKL or Overlap among extra)."
            )
        span = slice(int(shard.last[row]), int(shard.last[row + 1]))
        states: Tensor = shard.file.get_slice("last_hidden")[span]
        return states

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files behind: each worker opens its own."""
        return {**self.__dict__, "_opened": {}}

    def _find(self, index: int) -> tuple[_OpenShard, int]:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, place)
        if number not in self._opened:
            shard = self._shards[number]
            self._opened[number] = _OpenShard(self._folder / shard.file, shard)
        return self._opened[number], place - (self._ends[number - 1] if number else 0)
