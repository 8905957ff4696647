"""Pictures of a result: accepted length by benchmark, acceptance by position, waste."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafter.evaluation.results import AVERAGE, by_block_size, by_search, names_of

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
"""Paul Tol's bright scheme: told apart by the colour-blind too. More rows than these have a line
each (`_points`, `_position_fields`)."""

TOO_WIDE = 0.4
"""Of an interval: from where so little is known on, fields stay blank."""
BLANK = f"White: not drafted, or from where the 95 % interval is wider than {TOO_WIDE}."
"""What to say beside a picture with a line for each of many rows."""
SEARCH_STYLES = {
    "one draft": ("*", ""),
    "tree": ("o", "-"),
    "self-select": ("s", "--"),
    "cut draft": ("D", ""),
}
"""Marker and line of each way to draft."""

AT_THE_RIGHT: Mapping[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "textcoords": "offset points",
    "ha": "right",
    "fontsize": 8,
}
"""Of a word above a line across a panel."""

Searches = Mapping[str, Mapping[str, Sequence[Any]]]
"""Averages by drafter and way to draft."""


def plot_result(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns PNG files by name: `accepted_length`, `acceptance_by_position`, `waste`.

    Rows that were decoded at several block sizes give `block_sizes`, too; drafts searched in
    several sizes `searches`.

    Replay is shown where it was run, else the real loop.
    """
    mode = main_mode(result)
    drafters = {
        drafter["name"]: drafter["figures"][mode]
        for drafter in result["drafters"]
        if mode in drafter.get("figures", {})
    }
    sets = list(names_of(result, mode))
    sizes = by_block_size(result, mode)
    searches = by_search(result, mode)
    return {
        **({"block_sizes": _sizes(sizes)} if sizes else {}),
        **({"searches": plot_searches(searches, by_search(result, "decode"))} if searches else {}),
        "accepted_length": _bars(drafters, sets, "accepted_length", "accepted length", floor=1.0),
        "acceptance_by_position": _positions(drafters, sets),
        "waste": _bars(drafters, sets, "waste_ratio", "waste ratio"),
    }


def main_mode(result: Mapping[str, Any]) -> str:
    """Returns `replay` if any drafter was replayed, else `decode`."""
    replayed = any("replay" in drafter.get("figures", {}) for drafter in result["drafters"])
    return "replay" if replayed else "decode"


def write_plots(result: Mapping[str, Any], stem: Path) -> list[Path]:
    """Writes `<stem>-<name>.png`; returns the paths."""
    from drafter.files import write_atomic

    paths = []
    for name, content in plot_result(result).items():
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        write_atomic(paths[-1], content)
    return paths


def _bars(
    drafters: Mapping[str, Any], sets: Sequence[str], figure: str, label: str, floor: float = 0.0
) -> bytes:
    names = [*sets, AVERAGE] if len(sets) > 1 else list(sets)
    if len(drafters) > len(COLOURS):
        return _points(drafters, names, figure, label)
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(max(5.0, 1.4 * len(names) + 2), 3.8), layout="constrained")
    width = 0.8 / max(1, len(drafters))
    for n, figures in enumerate(drafters.values()):
        for place, name in enumerate(names):
            found = _found(figures, name, figure)
            if found is None:
                continue
            at = place + (n - (len(drafters) - 1) / 2) * width
            value = found["value"]
            ax.bar(
                at,
                value - floor,
                width * 0.92,
                bottom=floor,
                color=_colour(n, len(drafters)),
            )
            if not _none(found["low"]):
                below, above = max(0.0, value - found["low"]), max(0.0, found["high"] - value)
                ax.errorbar(at, value, [[below], [above]], color="black", capsize=2, linewidth=1)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    _legend(fig, drafters)
    return to_png(plt, fig)


def _points(drafters: Mapping[str, Any], names: Sequence[str], figure: str, label: str) -> bytes:
    """More rows than colours tell apart: a line for each, a field for each set."""
    plt = pyplot()
    fig, axes = plt.subplots(
        1,
        len(names),
        figsize=(1.7 * len(names) + 2.6, 0.26 * len(drafters) + 1.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes.flat, names, strict=True):
        for y, figures in enumerate(drafters.values()):
            found = _found(figures, name, figure)
            if found is None:
                continue
            value = found["value"]
            if y == 0:
                ax.axvline(value, color="black", linewidth=0.8, linestyle=":")
            ax.plot(value, y, "o", markersize=4, color=COLOURS[0])
            if not _none(found["low"]):
                ax.plot([found["low"], found["high"]], [y, y], color=COLOURS[0], linewidth=1.2)
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set_yticks(range(len(drafters)), list(drafters))
    axes.flat[0].invert_yaxis()  # shared
    fig.supxlabel(label)
    return to_png(plt, fig)


def _found(figures: Mapping[str, Any], name: str, figure: str) -> Mapping[str, Any] | None:
    """Returns a figure of a set, or of the average; None where there is none."""
    own = figures[AVERAGE] if name == AVERAGE else figures["sets"].get(name, {})
    found = own.get(figure)
    return None if not found or _none(found["value"]) else found


def _positions(drafters: Mapping[str, Any], sets: Sequence[str]) -> bytes:
    if len(drafters) > len(COLOURS):
        return _position_fields(drafters, sets)
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    longest = max(
        (len(own.get("accept_rate", [])) for f in drafters.values() for own in f["sets"].values()),
        default=1,
    )
    columns = min(3, max(1, len(sets)))
    rows = -(-len(sets) // columns) if sets else 1
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns + 0.6, 2.6 * rows + 0.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes.flat, sets, strict=False):
        for n, figures in enumerate(drafters.values()):
            rates = figures["sets"].get(name, {}).get("accept_rate", [])
            shown = [(k, r) for k, r in enumerate(rates, 1) if not _none(r["value"])]
            if not shown:
                continue
            k = [place for place, _ in shown]
            colour = _colour(n, len(drafters))
            ax.plot(k, [r["value"] for _, r in shown], ".-", color=colour)
            bounded = [(place, r) for place, r in shown if not _none(r["low"])]
            ax.fill_between(
                [place for place, _ in bounded],
                [r["low"] for _, r in bounded],
                [r["high"] for _, r in bounded],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        ax.set_title(name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(0, 1.02)
        ax.set_xlim(0.5, longest + 0.5)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(sets) :]:
        ax.set_visible(False)
    fig.supxlabel("slot k")
    fig.supylabel("P(k accepted | 1..k-1 accepted)")
    _legend(fig, drafters)
    return to_png(plt, fig)


def _position_fields(drafters: Mapping[str, Any], sets: Sequence[str]) -> bytes:
    """More rows than colours tell apart: a line of fields for each."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    columns = min(3, max(1, len(sets)))
    rows = -(-len(sets) // columns) if sets else 1
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns + 2.4, (0.2 * len(drafters) + 0.7) * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for ax, name in zip(axes.flat, sets, strict=False):
        rates = [
            figures["sets"].get(name, {}).get("accept_rate", []) for figures in drafters.values()
        ]
        longest = max(map(len, rates), default=0)
        values = [[float("nan")] * longest for _ in rates]
        for shown, own in zip(values, rates, strict=True):
            # behind a slot that few rounds got to there are fewer still
            sure = itertools.takewhile(
                lambda rate: not _none(rate["low"]) and rate["high"] - rate["low"] < TOO_WIDE, own
            )
            for slot, rate in enumerate(sure):
                shown[slot] = rate["value"]
        image = ax.imshow(
            values,
            vmin=0,
            vmax=1,
            cmap="viridis",
            aspect="auto",
            extent=(0.5, longest + 0.5, len(rates) - 0.5, -0.5),
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(name, fontsize=10)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(drafters)), list(drafters), fontsize=8)
    for ax in list(axes.flat)[len(sets) :]:
        ax.set_visible(False)
    fig.supxlabel("slot k")
    if image is not None:
        fig.colorbar(image, ax=axes, label="P(k accepted | 1..k-1 accepted)", shrink=0.6)
    return to_png(plt, fig)


def _legend(fig: Any, drafters: Mapping[str, Any]) -> None:
    if len(drafters) > 1:
        from matplotlib.patches import Patch

        patches = [
            Patch(color=_colour(n, len(drafters)), label=drafter)
            for n, drafter in enumerate(drafters)
        ]
        fig.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False)


def _colour(n: int, of: int) -> Any:
    if of <= len(COLOURS):
        return COLOURS[n]
    from matplotlib import colormaps

    return colormaps["viridis"](n / (of - 1))


def _sizes(sizes: Mapping[str, Mapping[int, Any]]) -> bytes:
    """A field a pair of trained row and block size in decoding, by average accepted length."""
    plt = pyplot()
    columns = sorted({size for own in sizes.values() for size in own})
    values = [
        [own[size]["value"] if size in own else float("nan") for size in columns]
        for own in sizes.values()
    ]
    fig, ax = plt.subplots(
        figsize=(1.1 * len(columns) + 2.4, 0.6 * len(sizes) + 1.4), layout="constrained"
    )
    image = ax.imshow(values, cmap="viridis", aspect="auto")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not _none(value):
                colour = "white" if value < middle else "black"
                ax.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(columns)), [f"K {size}" for size in columns])
    ax.set_yticks(range(len(sizes)), list(sizes))
    ax.set_xlabel("block size in decoding")
    ax.set_ylabel("trained")
    fig.colorbar(image, label="average accepted length")
    return to_png(plt, fig)


def plot_searches(measured: Searches, timed: Searches, alone: float | None = None) -> bytes:
    """Returns a PNG: accepted length, and tokens per second where they were timed, against drafted
    tokens a round.

    Args:
        measured: Averages (results.by_search) in the result's main mode.
        timed: Of the loop; empty if it did not run.
        alone: Tokens per second of the target alone, if they are known.
    """
    plt = pyplot()
    panels = [("accepted length", "accepted_length", measured)]
    panels += [("tokens per second", "tokens_per_second", timed)] if timed else []
    names = list(dict.fromkeys((*measured, *timed)))  # a colour each, in both panels
    present = {way for _, _, found in panels for ways in found.values() for way in ways}
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.0), squeeze=False, layout="constrained"
    )
    for ax, (label, figure, found) in zip(axes.flat, panels, strict=True):
        for name, ways in found.items():
            colour = _colour(names.index(name), len(names))
            for way, averages in ways.items():
                shown = [own for own in averages if not _none(own.get(figure, {}).get("value"))]
                x = [own["drafted_per_round"]["value"] for own in shown]
                y = [own[figure]["value"] for own in shown]
                marker, line = SEARCH_STYLES[way]
                ax.plot(x, y, marker=marker, linestyle=line, color=colour)
        if alone is not None and figure == "tokens_per_second":
            ax.axhline(alone, color="black", linewidth=1, linestyle=":")
            ax.annotate("target alone", (1, alone), (0, 3), **AT_THE_RIGHT)
        ax.set_xlabel("drafted tokens a round")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    lines = _search_legend(names, present)
    place = "outside upper center"
    fig.legend(handles=lines, loc=place, ncols=len(lines) if timed else 3, frameon=False)
    return to_png(plt, fig)


def _search_legend(names: Sequence[str], present: set[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color="black", marker=marker, linestyle=line, label=way)
        for way, (marker, line) in SEARCH_STYLES.items()
        if way in present
    ]
    if len(names) > 1:
        lines += [
            Line2D([], [], color=_colour(n, len(names)), linewidth=4, label=Path(name).name)
            for n, name in enumerate(names)
        ]
    return lines


def _none(value: float | None) -> bool:
    return value is None or value != value


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def to_png(plt: Any, fig: Any) -> bytes:
    """Returns a figure as a PNG file, and closes it."""
    buffer = io.BytesIO()
    # no date inside: the same figures give the same file
    fig.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(fig)
    return buffer.getvalue()
