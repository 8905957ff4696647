"""Grids of recipes: trained and measured under one budget, row by row, in one process.

A grid is a YAML file:

    base: [configs/smollm2.yaml]      # configs of train.py, first to last
    rows:
      - name: uniform
        configs: [configs/losses/uniform.yaml]
      - name: full, K 8
        configs: [configs/losses/full.yaml]
        flags: {model.block_size: 8}
    block_sizes: [8, 16]              # to decode with; default: each row's own
    one_budget: true                  # rows may not change steps, rows of data or anchors

What is finished lies in a file of its own, named by everything that made it. Rows that are there
are skipped; rows that an older recipe made are shown, and marked.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from drafter.errors import UserError
from drafter.evaluation.intervals import RESAMPLES, Runs
from drafter.evaluation.results import FORMAT, compare, describe
from drafter.evaluation.tallies import Tally
from drafter.files import write_atomic

ROW_FORMAT = 1
OLDER = " [older recipe]"
BUDGET = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "data.limit_rows",
    "data.num_anchors",
    "data.batch_size",
    "data.max_length",
)
"""Settings that rows of one budget share."""


@dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        name: In tables.
        configs: YAML files of train.py, the base's first.
        flags: Dotted settings that win over them.
    """

    name: str
    configs: tuple[str, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, seed: int, overrides: Sequence[str] = ()) -> list[str]:
        """Returns the command line of train.py's `fit` for a run of it, run folder apart."""
        out = [part for config in self.configs for part in ("--config", config)]
        out += [*overrides, f"--seed_everything={seed}"]
        return out + [f"--{key}={_yaml_value(value)}" for key, value in self.flags.items()]

    def recipe(self, seed: int, overrides: Sequence[str] = ()) -> str:
        """Returns 10 hex digits of a hash over everything that the training depends on."""
        content = [yaml.safe_load(Path(config).read_text()) for config in self.configs]
        made_of = [content, dict(self.flags), list(overrides), seed]
        text = json.dumps(made_of, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Grid:
    """Recipes that are compared."""

    name: str
    rows: tuple[Row, ...]
    block_sizes: tuple[int | None, ...] = (None,)


def read_grid(path: str | Path) -> Grid:
    """Returns the grid in a YAML file; paths in it are relative to where the command runs.

    Raises:
        UserError: The file is missing or malformed, a row has no or another's name, a config is
            not there, or a row changes the budget.
    """
    where = Path(path)
    try:
        content = yaml.safe_load(where.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such grid.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    known = {"base", "rows", "block_sizes", "one_budget"}
    if not isinstance(content, dict) or not content.get("rows") or set(content) - known:
        raise UserError(f"{path}: a grid has `base`, `rows`, and perhaps block_sizes, one_budget.")
    base = _paths(content.get("base", []), f"{path}: base")
    rows: list[Row] = []
    for entry in content["rows"]:
        if not isinstance(entry, dict) or not entry.get("name"):
            raise UserError(f"{path}: every row needs a name, and may have configs and flags.")
        name = str(entry["name"])
        if set(entry) - {"name", "configs", "flags"}:
            raise UserError(f"{path}: row {name!r} has fields other than name, configs and flags.")
        if name in {row.name for row in rows}:
            raise UserError(f"{path}: two rows are named {name!r}.")
        configs = _paths(entry.get("configs", []), f"{path}: row {name!r}")
        row = Row(name, (*base, *configs), entry.get("flags") or {})
        changed = _budget_changes(row, len(base))
        if content.get("one_budget", True) and changed:
            raise UserError(
                f"{path}: row {name!r} changes {', '.join(changed)}, so its budget is not the "
                "others'; say one_budget: false if that is meant."
            )
        rows.append(row)
    sizes = tuple(content.get("block_sizes") or (None,))
    return Grid(where.stem, tuple(rows), sizes)


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
    """

    folder: Path
    train: Callable[[list[str], Path], None]
    measure: Callable[[Path, Sequence[int | None]], list[dict[str, Any]]]
    measured_as: Mapping[str, Any]
    overrides: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def run(self, grids: Sequence[Grid], seeds: int) -> None:
        """Trains and measures what is not there yet; all rows of a seed before the next seed."""
        for seed in range(seeds):
            for grid in grids:
                for row in grid.rows:
                    self._finish(grid, row, seed)

    def pending(self, grids: Sequence[Grid], seeds: int) -> list[str]:
        """Returns what `run` would do, a line each."""
        lines = []
        for seed in range(seeds):
            for grid in grids:
                for row in grid.rows:
                    recipe = row.recipe(seed, self.overrides)
                    if self._row_path(row, seed, recipe, grid.block_sizes).exists():
                        state = "done"
                    elif self._trained(recipe):
                        state = "trained, to be measured"
                    else:
                        state = "to be trained and measured"
                    lines.append(f"{grid.name}: {row.name}, seed {seed}: {state}")
        return lines

    def _finish(self, grid: Grid, row: Row, seed: int) -> None:
        recipe = row.recipe(seed, self.overrides)
        path = self._row_path(row, seed, recipe, grid.block_sizes)
        title = f"{grid.name}: {row.name}, seed {seed}"
        if path.exists():
            print(f"[{title}] is there: {path.name}", flush=True)
            return
        run_dir = self.folder / "runs" / recipe
        if not self._trained(recipe):
            print(f"[{title}] trains in {run_dir}", flush=True)
            begun = time.perf_counter()
            self.train(row.arguments(seed, self.overrides), run_dir)
            seconds = {"seconds": time.perf_counter() - begun}
            write_atomic(run_dir / "finished.json", json.dumps(seconds))
        results = self.measure(run_dir, grid.block_sizes)
        content = {
            "format": ROW_FORMAT,
            "grid": grid.name,
            "row": row.name,
            "seed": seed,
            "recipe": recipe,
            "settings": _run_config(run_dir),
            "measured_as": dict(self.measured_as),
            "train_seconds": json.loads((run_dir / "finished.json").read_text())["seconds"],
            **self.record,
            "results": results,
        }
        write_atomic(path, json.dumps(content))
        lengths = ", ".join(
            f"{drafter['name']} {_average(drafter):.3f}"
            for result in results
            for drafter in result["drafters"]
            if drafter.get("figures")
        )
        print(f"[{title}] accepted length: {lengths}", flush=True)

    def _trained(self, recipe: str) -> bool:
        return (self.folder / "runs" / recipe / "finished.json").exists()

    def _row_path(
        self, row: Row, seed: int, recipe: str, block_sizes: Sequence[int | None]
    ) -> Path:
        """Grids that hold the same recipe share its row, whatever they call it."""
        measured = json.dumps([dict(self.measured_as), list(block_sizes)], sort_keys=True)
        suffix = hashlib.sha256(measured.encode()).hexdigest()[:6]
        ending = f"seed{seed}-{recipe}-{suffix}.json"
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
        entries: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        current: set[Path] = set()
        for row in grid.rows:
            for seed in range(seeds):
                path = self._row_path(row, seed, row.recipe(seed, self.overrides), grid.block_sizes)
                if path.exists():
                    current.add(path)
                    self._collect(entries, path, row.name)
        names = {row.name for row in grid.rows}
        for path in sorted((self.folder / "rows").glob("*.json")):
            content = json.loads(path.read_text())
            if path not in current and content["grid"] == grid.name and content["row"] in names:
                self._collect(entries, path, f"{content['row']}{OLDER}")
        if not entries:
            raise UserError(f"{self.folder}: no row of {grid.name} is finished yet.")
        first = next(iter(entries.values()))[0][1]
        return {
            **{k: v for k, v in first.items() if k not in ("drafters", "audit", "agreement")},
            **self.record,
            "format": FORMAT,
            "grid": grid.name,
            "drafters": [_entry(name, found, resamples) for name, found in entries.items()],
            "comparisons": _comparisons(entries, resamples),
        }

    @staticmethod
    def _collect(entries: dict[str, list[Any]], path: Path, name: str) -> None:
        content = json.loads(path.read_text())
        for result in content["results"]:
            for drafter in result["drafters"]:
                if drafter["block_size"] is None:  # prompt lookup
                    continue
                trained = content["settings"].get("model", {}).get("block_size")
                size = drafter["block_size"]
                label = name if size == trained else f"{name} @ K {size}"
                entries.setdefault(label, []).append((drafter, result))


def _entry(
    name: str, found: Sequence[tuple[dict[str, Any], dict[str, Any]]], resamples: int
) -> dict[str, Any]:
    drafters = [drafter for drafter, _ in found]
    figures = {}
    for mode in ("replay", "decode"):
        runs = _runs(drafters, mode)
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
    entries: Mapping[str, Sequence[tuple[dict[str, Any], Any]]], resamples: int
) -> list[dict[str, Any]]:
    """Every row against the first, and against the one before it."""
    rows = []
    names = [name for name in entries if OLDER not in name]
    for mode in ("replay", "decode"):
        runs = {name: _runs([drafter for drafter, _ in entries[name]], mode) for name in names}
        for place, name in enumerate(names[1:], 1):
            for other in dict.fromkeys((names[0], names[place - 1])):
                if runs[name] and runs[other]:
                    rows += [
                        {"mode": mode, "a": name, "b": other, **row}
                        for row in compare(runs[name], runs[other], resamples)
                    ]
    return rows


def _runs(drafters: Sequence[Mapping[str, Any]], mode: str) -> Runs:
    return [
        [Tally.from_json(row) for row in drafter["responses"][mode]]
        for drafter in drafters
        if drafter["responses"].get(mode)
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
    files = sorted(run_dir.glob("config*.yaml"), key=lambda path: path.stat().st_mtime)
    return yaml.safe_load(files[-1].read_text()) if files else {}


def _budget_changes(row: Row, base_configs: int) -> list[str]:
    changed = [key for key in BUDGET if key in row.flags]
    for config in row.configs[base_configs:]:
        content = yaml.safe_load(Path(config).read_text()) or {}
        for key in BUDGET:
            group, name = key.split(".")
            if name in (content.get(group) or {}):
                changed.append(key)
    return changed


def _paths(value: Any, where: str) -> list[str]:
    paths = [value] if isinstance(value, str) else list(value or [])
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{where}: there is no config {path}.")
    return [str(path) for path in paths]


def _yaml_value(value: Any) -> str:
    """Returns a value as train.py reads it from a flag."""
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()
