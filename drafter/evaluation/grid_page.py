"""A grid of an ablation as a page of Markdown with pictures, for people who ask what holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafter.evaluation.markdown import figure_rows, markdown_rows
from drafter.evaluation.plots import BLANK, COLOURS, main_mode
from drafter.evaluation.results import AVERAGE, by_block_size, names_of
from drafter.evaluation.tables import number, signed


def grid_page(result: Mapping[str, Any]) -> str:
    """Returns the page; its pictures are `<page_stem>-<name>.png` beside it (plots.plot_result).

    Args:
        result: Of one grid (`Ablation.results`).
    """
    mode = main_mode(result)
    names = list(names_of(result, mode))
    rows = {
        drafter["name"]: drafter
        for drafter in result["drafters"]
        if mode in drafter.get("figures", {})
    }
    figures = {name: row["figures"][mode] for name, row in rows.items()}
    stem = page_stem(result)
    parts = [
        f"# {stem}",
        _facts(result, rows),
        f"    python {result['command']}{'' if result['device_name'] == 'CPU' else '  # GPU'}",
        f"![Accepted length]({stem}-accepted_length.png)",
        _lengths(figures, names),
        *_block_sizes(result, mode),
        "## On the same prompts and seeds",
        _differences(result, mode, names),
        "## Waste: right drafts behind their block's first error",
        f"![Waste]({stem}-waste.png)",
        _wastes(figures, names),
        "## Acceptance by position",
        f"![Acceptance by position]({stem}-acceptance_by_position.png)",
        *([BLANK] if len(figures) > len(COLOURS) else []),
        "## Accepted length by tokens of the prompt, all sets pooled",
        _by_prompt_length(figures),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(result: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    settings = result["settings"]
    temperature = settings["sampling"]["temperature"]
    runs = sorted({row["runs"] for row in rows.values()})
    seeds = " or ".join(map(str, runs))
    return (
        "Accepted length: tokens per target pass, bonus token included, pooled over rounds, by "
        f"{'replay of' if main_mode(result) == 'replay' else 'decoding'} the target's own "
        f"{'greedy' if not temperature else f'temperature {temperature:g}'} responses of at most "
        f"{settings['max_new_tokens']} tokens. {seeds} {'seed' if runs == [1] else 'seeds'} a row "
        "(initialisation, order of rows, anchors); 95 % intervals draw prompts"
        f"{'' if runs == [1] else ' and seeds'} anew. Target {result['target']['path']} "
        f"({result['dtype']}); {result['device_name']}, {result['date']}, torch {result['torch']}, "
        f"commits {', '.join(one[:7] for one in str(result['revision']).split(', '))}."
    )


def _lengths(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """The average's gain over the first row beside it."""
    first = next(iter(figures))
    base = figures[first][AVERAGE]["accepted_length"]["value"]
    head, body = figure_rows(figures, names, "accepted_length")
    for row, found in zip(body, figures.values(), strict=True):
        own = found[AVERAGE]["accepted_length"]["value"]
        row.append("" if row[0] == first else f"{100 * (own / base - 1):+.1f} %")
    return "\n".join(markdown_rows(["", *head[1:], f"over {first}"], body))


def _block_sizes(result: Mapping[str, Any], mode: str) -> list[str]:
    """Every trained row at every block size, if the grid decodes at several."""
    sizes = by_block_size(result, mode)
    if not sizes:
        return []
    columns = sorted({size for own in sizes.values() for size in own})
    body = [
        [name, *(number(own[size]["value"]) if size in own else "-" for size in columns)]
        for name, own in sizes.items()
    ]
    head = ["trained", *(f"decoded at K {size}" for size in columns)]
    return [
        "## Block size in training against block size in decoding: the average",
        f"![Block sizes]({page_stem(result)}-block_sizes.png)",
        "\n".join(markdown_rows(head, body)),
    ]


def page_stem(result: Mapping[str, Any]) -> str:
    """Returns what a grid's page and pictures are called: its name, and the temperature if any.

    Example:
        >>> page_stem({"grid": "alone", "settings": {"sampling": {"temperature": 0.7}}})
        'alone-temperature-0.7'
    """
    temperature = result["settings"]["sampling"]["temperature"]
    return str(result["grid"]) + (f"-temperature-{temperature:g}" if temperature else "")


def _differences(result: Mapping[str, Any], mode: str, names: Sequence[str]) -> str:
    """A line a pair of rows: the average with its interval, and each set's verdict."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["comparisons"]:
        if row["mode"] == mode and row["figure"] == "accepted_length":
            pairs.setdefault((row["a"], row["b"]), {})[row["set"]] = row
    head = ["", "against", *names, AVERAGE, "95 %", "verdict", "seeds"]
    body = []
    for (a, b), sets in pairs.items():
        cells = []
        for name in names:
            found = sets.get(name)
            sure = found is not None and found["verdict"] != "not told apart"
            text = "-" if found is None else signed(found["difference"]["value"])
            cells.append(f"**{text}**" if sure else text)
        average = sets[AVERAGE]
        own = average["difference"]
        interval = f"{signed(own['low'])} to {signed(own['high'])}"
        cells += [signed(own["value"]), interval, average["verdict"], str(average["runs"])]
        body.append([a, b, *cells])
    lines = markdown_rows(head, body)
    return "\n".join(lines) + "\n\nBold: the set's own 95 % interval does not hold 0."


def _wastes(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    head, body = figure_rows(figures, names, "waste_ratio")
    return "\n".join(markdown_rows(["", *head[1:]], body))


def _by_prompt_length(figures: Mapping[str, Any]) -> str:
    bounds: dict[Any, int] = {}
    for found in figures.values():
        for row in found["by_prompt_length"]:
            bounds.setdefault(row["up_to"], row["prompts"])
    ends = sorted(bounds, key=lambda end: float("inf") if end is None else end)
    names = ["beyond" if end is None else f"up to {end}" for end in ends]
    head = ["", *(f"{name} ({bounds[end]})" for name, end in zip(names, ends, strict=True))]
    body = []
    for name, found in figures.items():
        own = {row["up_to"]: row["accepted_length"] for row in found["by_prompt_length"]}
        body.append([name, *(number(own[end]["value"]) if end in own else "-" for end in ends)])
    return "\n".join(markdown_rows(head, body)) + "\n\nIn brackets: prompts."
