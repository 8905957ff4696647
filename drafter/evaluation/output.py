"""Writes results: figures as JSON, tables, plots, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter.evaluation.asked import asked_path, write_asked, wrote_asked
from drafter.evaluation.grid_page import grid_page, page_stem
from drafter.evaluation.markdown import markdown
from drafter.evaluation.page import html_page
from drafter.evaluation.plots import write_plots
from drafter.evaluation.results import without_nan
from drafter.evaluation.tables import table
from drafter.files import write_atomic


def show(result: dict[str, Any]) -> None:
    """Prints the tables, and what was left out of them."""
    print()
    for reason in result["misfits"]:
        print(f"left out: {reason}")
    print(table(result))


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes `<stem>.json`, and beside it `<stem>.md`, `<stem>-*.png`, `<stem>.html` and, of the
    result's `prompts`, `<stem>-prompts.jsonl`.
    """
    prompts = result.get("prompts")
    result = without_nan({key: value for key, value in result.items() if key != "prompts"})
    stem = path.with_suffix("")
    if prompts:
        write_asked(prompts, asked_path(path))
    elif wrote_asked(asked_path(path)):  # another result's
        asked_path(path).unlink()
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    write_atomic(stem.with_name(f"{stem.name}.md"), markdown(result))
    write_plots(result, stem)
    write_atomic(stem.with_name(f"{stem.name}.html"), html_page([result]))
    print(f"figures: {path}; tables, plots and page: {stem}.md, {stem}-*.png, {stem}.html")


def write_ablation(
    results: Sequence[dict[str, Any]], folder: Path, tables: Path | None = None
) -> None:
    """Prints the grids' tables; writes `ablation.json`, `ablation.md` and `ablation.html`.

    Args:
        results: Of the grids.
        folder: Of these files.
        tables: Where each grid's own page goes, `<grid>.md` with its pictures and figures
            (`<grid>.json`; grid_page.page_stem); None for nowhere.
    """
    results = [without_nan(result) for result in results]
    text = "\n".join(f"## {result['grid']}\n\n{markdown(result)}" for result in results)
    write_atomic(folder / "ablation.json", json.dumps(results, indent=1) + "\n")
    write_atomic(folder / "ablation.md", text)
    write_atomic(folder / "ablation.html", html_page(results, "Ablation"))
    print(text)
    if tables is not None:
        for result in results:
            stem = tables / page_stem(result)
            figures = {**result, "drafters": [{**d, "samples": []} for d in result["drafters"]]}
            write_atomic(tables / f"{stem.name}.md", grid_page(result))
            write_atomic(tables / f"{stem.name}.json", json.dumps(figures) + "\n")
            write_plots(result, stem)
            print(f"page: {stem}.md")
    print(f"rows: {folder}/rows; tables: {folder}/ablation.md; page: {folder}/ablation.html")
