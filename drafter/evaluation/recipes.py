"""Grids of recipes as YAML files, and what a recipe is: its effective settings and its data.

For example:

    base: [configs/smollm2.yaml]      # configs of train.py, first to last
    rows:
      - name: uniform
        configs: [configs/losses/uniform.yaml]
      - name: full, K 8
        configs: [configs/losses/full.yaml]
        flags: {model.block_size: 8}
    block_sizes: [8, 16]              # to decode with; default: each row's own
    one_budget: true                  # rows may not change steps, rows of data or anchors
    against: [uniform]                # rows to compare with; default: the first, and the one before
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from drafter.config import check_block_size
from drafter.errors import UserError
from drafter.files import file_stamp, local_copy

BUDGET = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.limit_train_batches",
    "trainer.accumulate_grad_batches",
    "data.limit_rows",
    "data.num_anchors",
    "data.batch_size",
    "data.max_length",
)
"""Settings that rows of one budget share."""
FILES = ("data.target", "data.train_data", "data.val_data")
"""Settings that name files: a recipe is made of what they hold, too."""


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
        return out + [f"--{key}={yaml_value(value)}" for key, value in self.flags.items()]

    def family(self, overrides: Sequence[str] = ()) -> str:
        """Returns 8 hex digits of a hash over all that training depends on but the seed."""
        settings = self.settings(overrides)
        held = {
            key: [stamp for path in _listed(settings[key]) for stamp in _stamps(path)]
            for key in FILES
            if settings.get(key)
        }
        text = json.dumps([settings, held], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def settings(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the effective settings as dotted keys: configs, then overrides, then flags."""
        out: dict[str, Any] = {}
        for config in self.configs:
            out |= flat(read_yaml(config))
        out |= _override_settings(overrides)
        out |= dict(self.flags)
        return {k: v for k, v in out.items() if k not in ("seed_everything", "run_dir")}


@dataclass(frozen=True)
class Grid:
    """Recipes that are compared.

    Attributes:
        name: The file's, without its ending.
        rows: Of the table, in its order.
        block_sizes: To decode with; None for each row's own.
        against: Names of rows that those after them are compared with; none for the first row and
            the one before.
    """

    name: str
    rows: tuple[Row, ...]
    block_sizes: tuple[int | None, ...] = (None,)
    against: tuple[str, ...] = ()


def read_grid(path: str | Path) -> Grid:
    """Returns the grid in a YAML file; paths in it are relative to where the command runs.

    Raises:
        UserError: The file is missing or malformed, a row has no or another's name, a config is
            not there, or a row changes the budget.
    """
    where = Path(path)
    content = read_yaml(path, "grid")
    known = {"base", "rows", "block_sizes", "one_budget", "against"}
    if not isinstance(content.get("rows"), list) or not content["rows"] or set(content) - known:
        raise UserError(
            f"{path}: a grid has `base`, `rows`, and perhaps block_sizes, one_budget, against."
        )
    base = _configs(content.get("base", []), f"{path}: base")
    rows: list[Row] = []
    for entry in content["rows"]:
        row = _row(entry, base, path)
        if row.name in {known_row.name for known_row in rows}:
            raise UserError(f"{path}: two rows are named {row.name!r}.")
        changed = _budget_changes(row, len(base))
        if content.get("one_budget", True) and changed:
            raise UserError(
                f"{path}: row {row.name!r} changes {', '.join(changed)}, so its budget is not the "
                "others'; say one_budget: false if that is meant."
            )
        rows.append(row)
    sizes = content.get("block_sizes") or [None]
    if not isinstance(sizes, list) or not all(s is None or isinstance(s, int) for s in sizes):
        raise UserError(f"{path}: block_sizes must be a list of whole numbers, not {sizes!r}.")
    for size in sizes:
        if size is not None:
            check_block_size(size)
    against = content.get("against") or []
    if not isinstance(against, list) or not {row.name for row in rows} >= set(map(str, against)):
        raise UserError(f"{path}: against must be a list of the grid's rows, not {against!r}.")
    return Grid(where.stem, tuple(rows), tuple(sizes), tuple(map(str, against)))


def _row(entry: Any, base: Sequence[str], path: str | Path) -> Row:
    if not isinstance(entry, dict) or not entry.get("name"):
        raise UserError(f"{path}: every row needs a name, and may have configs and flags.")
    name = str(entry["name"])
    if set(entry) - {"name", "configs", "flags"}:
        raise UserError(f"{path}: row {name!r} has fields other than name, configs and flags.")
    given = entry.get("flags") or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: flags of row {name!r} must be settings, not {given!r:.60}.")
    flags = flat(given)
    taken = sorted(flags.keys() & {"seed_everything", "run_dir", "ckpt_path"})
    if taken:
        raise UserError(f"{path}: row {name!r} sets {taken[0]}, which the ablation sets itself.")
    configs = _configs(entry.get("configs", []), f"{path}: row {name!r}")
    return Row(name, (*base, *configs), flags)


def read_yaml(path: str | Path, what: str = "config") -> dict[str, Any]:
    """Returns a YAML file's settings.

    Raises:
        UserError: It is missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: there is no such {what}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: a {what} is a mapping of settings, not {content!r:.60}.")
    return content or {}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as dotted keys.

    Example:
        >>> flat({"trainer": {"max_steps": 3}, "model.loss": {"gamma": 4}})
        {'trainer.max_steps': 3, 'model.loss.gamma': 4}
    """
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _override_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns what flags of train.py set, their --config files included."""
    out: dict[str, Any] = {}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"after `--` stand flags of train.py, not {word!r}.")
        name, given, value = word[2:].partition("=")
        if not given:
            if not words or words[0].startswith("--"):
                raise UserError(f"flag {word} has no value: {shlex.join(overrides)}")
            value = words.pop(0)
        if name == "config":
            out |= flat(read_yaml(value))
        else:
            try:
                out[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                out[name] = value
    return out


def _budget_changes(row: Row, base_configs: int) -> list[str]:
    own: dict[str, Any] = dict(row.flags)
    for config in row.configs[base_configs:]:
        own |= flat(read_yaml(config))
    return [key for key in BUDGET if key in own]


def _configs(value: Any, where: str) -> list[str]:
    paths = _listed(value)
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{where}: there is no config {path}.")
        read_yaml(path)
    return paths


def _stamps(source: str) -> list[str]:
    """Returns the stamp of a source; of a preset's copy also that of data/ in it, as on the hub."""
    path = local_copy(source)
    places = [path] if path == source else [path, str(Path(path) / "data")]
    return [file_stamp(place) for place in places]


def _listed(value: Any) -> list[str]:
    return [
        str(v) for v in (value if isinstance(value, list | tuple) else [value] if value else [])
    ]


def yaml_value(value: Any) -> str:
    """Returns a value as train.py reads it from a flag."""
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()
