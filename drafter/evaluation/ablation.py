"""Trains and measures grids of recipes under one budget, row by row, in one process.

What is finished lies in a file of its own, named by everything that made it. Rows that are there
are skipped; rows that an older recipe made are shown, and marked.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from drafter.errors import UserError
from drafter.evaluation.intervals import RESAMPLES, Runs
from drafter.evaluation.measured_sets import PROMPT_LOOKUP
from drafter.evaluation.plan import clock
from drafter.evaluation.recipes import Grid, Row
from drafter.evaluation.results import AT_SIZE, FORMAT, compare, describe
from drafter.evaluation.tallies import Tally
from drafter.files import lock, pieces, write_atomic

ROW_FORMAT = 2
OLDER = " [older recipe"
RECORD = ("date", "revision", "torch", "device_name")
"""What a table says of the runs that it is made of; several values stand side by side."""


@dataclass(frozen=True)
class Found:
    """A finished row's drafter, at one block size.

    Attributes:
        seed: Of its run.
        drafter: Its entry in `result`.
        result: See drafter.evaluation.results.
        record: See `RECORD`.
    """

    seed: int
    drafter: dict[str, Any]
    result: dict[str, Any]
    record: dict[str, Any]


@dataclass
class Ablation:
    """Trains and measures grids, and keeps every finished row.

    Args:
        folder: Of rows, runs, tables and page.
        train: (arguments of `fit`, run folder) -> trains, going on from what is there.
        measure: (run folder, block sizes) -> a result (see drafter.evaluation.results) for each.
        measured_as: Plain values that figures depend on beside the drafter; part of a row's name.
        overrides: Further arguments of `fit` for every row.
        record: Plain values for the record: revision, device.
        fresh: Measure again the rows that were finished before this object was made.
    """

    folder: Path
    train: Callable[[list[str], Path], None]
    measure: Callable[[Path, Sequence[int | None]], list[dict[str, Any]]]
    measured_as: Mapping[str, Any]
    overrides: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    _made: float = field(default_factory=time.time, init=False)

    def run(
        self,
        grids: Sequence[Grid],
        seeds: int,
        budget: float = math.inf,
    ) -> int:
        """Trains and measures what is not there yet; all rows of a seed before the next seed.

        Several processes may do so in one folder, one on each GPU: each takes the next row that is
        neither there nor in another's hands. A row that fails does not keep others from running.

        Args:
            grids: Of recipes; one that several hold is trained once.
            seeds: 0, 1, ..., seeds - 1.
            budget: Seconds; none is begun that would probably not end within.

        Returns:
            How many rows are missing at the end: not begun, or in another process's hands.

        Raises:
            UserError: Rows have failed, after all others; or one by a user's mistake, where there
                is none yet that has not.
        """
        begun = time.perf_counter()
        paces: list[float] = []
        failed: list[str] = []
        rows = self._distinct(grids, seeds)
        for grid, row, seed in rows:
            spent = time.perf_counter() - begun
            title = f"{grid.name}: {row.name}, seed {seed}"
            there = self._is_there(self._row_path(grid, row, seed))
            trained = self._trained(row, seed)
            if not there and not trained and spent + (1.1 * min(paces) if paces else 0.0) > budget:
                left = max(0.0, budget - spent)
                print(f"[{title}] not begun: {left:.0f} s are left")
                continue
            with lock(self._run_dir(row, seed).with_suffix(".lock")) as mine:
                if not mine:
                    print(f"[{title}] is in another process's hands", flush=True)
                    continue
                try:
                    if self._finish(grid, row, seed, title):
                        # the first one also loads the target and makes the features
                        paces.append(time.perf_counter() - begun - spent)
                except Exception as error:
                    if isinstance(error, UserError) and not self._any_there(rows):
                        raise  # probably every row's
                    traceback.print_exc()
                    failed.append(f"{title} ({_first_line(error)})")
                    _check_device()
        if failed:
            raise UserError(
                f"{len(failed)} of the rows failed, the others are kept: {'; '.join(failed)}. The "
                "same command tries them again."
            )
        return sum(not self._is_there(self._row_path(*row)) for row in rows)

    def _any_there(self, rows: Sequence[tuple[Grid, Row, int]]) -> bool:
        return any(self._row_path(*row).exists() for row in rows)

    def _is_there(self, path: Path) -> bool:
        return path.exists() and not (self.fresh and path.stat().st_mtime < self._made)

    def _distinct(self, grids: Sequence[Grid], seeds: int) -> list[tuple[Grid, Row, int]]:
        """Returns what `run` goes through, each recipe, seed and way of measuring once."""
        found: dict[tuple[str, str, int], tuple[Grid, Row, int]] = {}
        for seed in range(seeds):
            for grid in grids:
                for row in grid.rows:
                    key = (row.family(self.overrides), self._measured(grid), seed)
                    found.setdefault(key, (grid, row, seed))
        return list(found.values())

    def pending(self, grids: Sequence[Grid], seeds: int) -> list[str]:
        """Returns what `run` would do, a line each."""
        lines = []
        for seed in range(seeds):
            for grid in grids:
                for row in grid.rows:
                    if self._row_path(grid, row, seed).exists():
                        state = "done"
                    elif self._trained(row, seed):
                        state = "trained, to be measured"
                    else:
                        state = "to be trained and measured"
                    lines.append(f"{grid.name}: {row.name}, seed {seed}: {state}")
        waiting = sum(
            not (self._row_path(grid, row, seed).exists() or self._trained(row, seed))
            for grid, row, seed in self._distinct(grids, seeds)
        )
        known = [
            json.loads(path.read_text())["seconds"]
            for path in (self.folder / "runs").glob("*/finished.json")
        ]
        if waiting and known:
            seconds = waiting * sum(known) / len(known)
            size = waiting * _folder_bytes(self.folder / "runs") / len(known)
            lines.append(
                f"about {clock(seconds)} of training and {size / 1e6:.0f} MB of checkpoints, as "
                f"the {len(known)} runs that are there took"
            )
        elif waiting:
            lines.append("no run is finished yet, so there is nothing to estimate time from")
        return lines

    def _finish(self, grid: Grid, row: Row, seed: int, title: str) -> bool:
        """Does what a row lacks; returns whether it was trained."""
        path = self._row_path(grid, row, seed)
        if self._is_there(path):
            print(f"[{title}] is there: {path.name}", flush=True)
            return False
        run_dir = self._run_dir(row, seed)
        trains = not self._trained(row, seed)
        if trains:
            print(f"[{title}] trains in {run_dir}", flush=True)
            begun = time.perf_counter()
            self.train(row.arguments(seed, self.overrides), run_dir)
            # of the last piece, where the run was cut off and went on
            seconds = {"seconds": time.perf_counter() - begun}
            write_atomic(run_dir / "finished.json", json.dumps(seconds))
        results = self.measure(run_dir, grid.block_sizes)
        content = {
            "format": ROW_FORMAT,
            "grid": grid.name,
            "row": row.name,
            "seed": seed,
            "family": row.family(self.overrides),
            "measured": self._measured(grid),
            "settings": _run_config(run_dir),
            "measured_as": dict(self.measured_as),
            "train_seconds": json.loads((run_dir / "finished.json").read_text())["seconds"],
            **self.record,
            "results": results,
        }
        write_atomic(path, json.dumps(content))
        lengths = ", ".join(
            f"K {drafter['block_size']} {_average(drafter):.3f}"
            for result in results
            for drafter in _models(result)
        )
        print(f"[{title}] average accepted length: {lengths}", flush=True)
        return trains

    def _trained(self, row: Row, seed: int) -> bool:
        return (self._run_dir(row, seed) / "finished.json").exists()

    def _run_dir(self, row: Row, seed: int) -> Path:
        return self.folder / "runs" / f"{row.family(self.overrides)}-seed{seed}"

    def _measured(self, grid: Grid) -> str:
        """Returns 6 hex digits of how rows are measured."""
        text = json.dumps([dict(self.measured_as), list(grid.block_sizes)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:6]

    def _row_path(self, grid: Grid, row: Row, seed: int) -> Path:
        """Grids that hold the same recipe share its row, whatever they call it."""
        ending = f"{row.family(self.overrides)}-seed{seed}-{self._measured(grid)}.json"
        rows = self.folder / "rows"
        found = sorted(rows.glob(f"*-{ending}"))
        return found[0] if found else rows / f"{slug(row.name)}-{ending}"

    # ------------------------------------------------------------------ tables

    def results(
        self, grids: Sequence[Grid], seeds: int, resamples: int = RESAMPLES
    ) -> list[dict[str, Any]]:
        """Returns one result per grid: a drafter a row (and block size), all seeds together."""
        return [self._result(grid, seeds, resamples) for grid in grids]

    def _result(self, grid: Grid, seeds: int, resamples: int) -> dict[str, Any]:
        entries: dict[str, list[Found]] = {}
        families: dict[str, str] = {}
        for row in grid.rows:
            families[row.name] = row.family(self.overrides)
            for seed in range(seeds):
                path = self._row_path(grid, row, seed)
                if path.exists():
                    self._collect(entries, json.loads(path.read_text()), row.name)
        for path in sorted((self.folder / "rows").glob("*.json")):
            content = json.loads(path.read_text())
            name, family = content.get("row"), content.get("family")
            mine = content.get("grid") == grid.name and name in families
            if mine and content["measured"] == self._measured(grid) and family != families[name]:
                self._collect(entries, content, f"{name}{OLDER} {family}]")
        if not entries:
            raise UserError(f"{self.folder}: no row of {grid.name} is finished yet.")
        first = next(iter(entries.values()))[0].result
        return {
            **{k: v for k, v in first.items() if k not in ("drafters", "audit", "agreement")},
            **self.record,
            **_record(entries),
            "format": FORMAT,
            "grid": grid.name,
            "drafters": [_entry(name, found, resamples) for name, found in entries.items()],
            "comparisons": _comparisons(entries, grid.against, resamples),
            "overlap": {
                name: found[0].result.get("overlap", {}).get(found[0].drafter["name"], {})
                for name, found in entries.items()
            },
            **{
                key: [
                    {**check, "drafter": name}
                    for name, found in entries.items()
                    for one in found
                    for check in one.result.get(key) or []
                    if check["drafter"] == one.drafter["name"]
                ]
                for key in ("audit", "agreement")
            },
        }

    @staticmethod
    def _collect(entries: dict[str, list[Found]], content: dict[str, Any], name: str) -> None:
        trained = content["settings"].get("model", {}).get("block_size")
        record = {key: content.get(key) for key in RECORD}
        for result in content["results"]:
            for drafter in _models(result):
                size = drafter["block_size"]
                label = name if size == trained else f"{name}{AT_SIZE}{size}"
                found = Found(content["seed"], drafter, result, record)
                entries.setdefault(label, []).append(found)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_device() -> None:
    """Raises where a failed row has left the GPU unusable for this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _models(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the drafters that are models: prompt lookup is the same in every row."""
    return [drafter for drafter in result["drafters"] if drafter["fingerprint"] != PROMPT_LOOKUP]


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _record(entries: Mapping[str, Sequence[Found]]) -> dict[str, str]:
    """Returns where and when rows were trained and measured, not where the table is made."""
    everything = [
        one.record for name, found in entries.items() if OLDER not in name for one in found
    ]
    return {
        key: ", ".join(sorted({str(record[key]) for record in everything if record[key]}))
        for key in RECORD
    }


def _entry(name: str, found: Sequence[Found], resamples: int) -> dict[str, Any]:
    drafters = [one.drafter for one in found]
    figures = {}
    for mode in ("replay", "decode"):
        runs = _runs(found, mode)
        if runs:
            figures[mode] = describe(runs, resamples)
    return {
        "name": name,
        "block_size": drafters[0]["block_size"],
        "fingerprint": [drafter["fingerprint"] for drafter in drafters],
        "runs": len(drafters),
        "figures": figures,
        "responses": {},
        "samples": drafters[0].get("samples", []),
    }


def _comparisons(
    entries: Mapping[str, Sequence[Found]], against: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    """Every row against those named, on the seeds that both have.

    By default against the first, and against the one before it.
    """
    rows = []
    names = [name for name in entries if OLDER not in name]
    for mode in ("replay", "decode"):
        for place, name in enumerate(names[1:], 1):
            others = [o for o in against if o in names[:place]] or [names[0], names[place - 1]]
            for other in dict.fromkeys(others):
                seeds = {one.seed for one in entries[name]} & {one.seed for one in entries[other]}
                a, b = (_runs(entries[which], mode, seeds) for which in (name, other))
                if a and len(a) == len(b):
                    rows += [
                        {"mode": mode, "a": name, "b": other, "runs": len(a), **row}
                        for row in compare(a, b, resamples)
                    ]
    return rows


def _runs(found: Sequence[Found], mode: str, seeds: Collection[int] | None = None) -> Runs:
    return [
        [Tally.from_json(row) for row in one.drafter["responses"][mode]]
        for one in sorted(found, key=lambda one: one.seed)
        if one.drafter["responses"].get(mode) and (seeds is None or one.seed in seeds)
    ]


def _average(drafter: Mapping[str, Any]) -> float:
    mode = "replay" if "replay" in drafter["figures"] else "decode"
    return float(drafter["figures"][mode]["average"]["accepted_length"]["value"])


def slug(name: str) -> str:
    """Returns a row's name as part of a file's.

    Example:
        >>> slug("+ chain, K 8")
        'chain-K-8'
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "row"


def _run_config(run_dir: Path) -> dict[str, Any]:
    files = pieces(run_dir, "config", ".yaml")
    return yaml.safe_load(files[-1].read_text()) if files else {}
