"""Draws docs/idea.svg: `python docs/make_idea.py`."""

from __future__ import annotations

from pathlib import Path

DRAFT = ["The", "answer", "is", "4", "2", "apples", ".", "</s>"]
TARGET = ["The", "answer", "is", "4", "0", "pears", ".", "</s>"]
FIRST_ERROR = 4
WIDTH, CELL, LEFT, TOP = 900, 86, 190, 74
GREEN, RED, GREY, BLUE, INK = "#2e8b57", "#c0392b", "#b9bec6", "#2f6db3", "#24292f"


def text(x: float, y: float, body: str, size: int = 15, colour: str = INK, extra: str = "") -> str:
    """Returns one line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" {extra}>{body}</text>'


def cell(slot: int, y: float, body: str, fill: str, colour: str = "#ffffff") -> str:
    """Returns a token's box at a slot."""
    x = LEFT + slot * CELL
    body = body.replace("<", "&lt;")
    box = f'<rect x="{x}" y="{y}" width="{CELL - 8}" height="34" rx="6" fill="{fill}"/>'
    return box + text(x + (CELL - 8) / 2, y + 23, body, 15, colour, 'text-anchor="middle"')


def bars(y: float, heights: list[float], colour: str) -> str:
    """Returns bars standing on y at slots 1..7."""
    return "".join(
        f'<rect x="{LEFT + k * CELL + 22}" y="{y - 46 * h:.1f}" width="34" '
        f'height="{max(1.0, 46 * h):.1f}" fill="{colour}"/>'
        for k, h in enumerate(heights, start=1)
    )


def main() -> None:
    """Writes the picture."""
    decay = [2.718 ** (-(k - 1) / 4) for k in range(1, 8)]
    focal = [1.0 if k == FIRST_ERROR else 0.0 for k in range(1, 8)]
    probs = [0.95, 0.9, 0.9, 0.45, 0.5, 0.9, 0.9]
    chain = [sum_after(probs, k) for k in range(7)]
    chain = [value / max(chain) for value in chain]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 470" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="470" fill="#ffffff"/>',
        text(
            14,
            30,
            "One round: the drafter fills a block in one pass, the target checks it left to right",
            18,
            INK,
            'font-weight="bold"',
        ),
        text(14, TOP + 23, "drafter, one pass"),
        text(14, TOP + 67, "target, one pass"),
    ]
    for slot, (draft, target) in enumerate(zip(DRAFT, TARGET, strict=True)):
        kept = slot < FIRST_ERROR
        fill = BLUE if slot == 0 else GREEN if kept else RED if slot == FIRST_ERROR else GREY
        out.append(cell(slot, TOP, draft, fill))
        if slot <= FIRST_ERROR:
            out.append(cell(slot, TOP + 44, target, "#e8f3ec" if kept else "#fbe9e7", INK))
        elif draft == target:
            out.append(
                text(
                    LEFT + slot * CELL + 39,
                    TOP + 67,
                    "right, but",
                    12,
                    "#6b7280",
                    'text-anchor="middle"',
                )
            )
            out.append(
                text(
                    LEFT + slot * CELL + 39,
                    TOP + 83,
                    "thrown away",
                    12,
                    "#6b7280",
                    'text-anchor="middle"',
                )
            )
    out += [
        text(LEFT, TOP + 116, "anchor", 14, BLUE),
        text(LEFT + CELL, TOP + 116, "accepted", 14, GREEN),
        text(
            LEFT + FIRST_ERROR * CELL,
            TOP + 116,
            "first error: the target's token stands here",
            14,
            RED,
        ),
        text(14, 240, "What training weighs at each slot", 18, INK, 'font-weight="bold"'),
    ]
    rows = [
        ("positional weighting", "exp(-(k-1)/&#947;)", decay, BLUE),
        ("first-error focal", "only the first error", focal, RED),
        ("chain", "what comes with each slot", chain, GREEN),
    ]
    for i, (name, formula, heights, colour) in enumerate(rows):
        base = 310 + 70 * i
        out.append(text(14, base - 20, name, 15, INK, 'font-weight="bold"'))
        out.append(text(14, base - 2, formula, 13, "#6b7280"))
        out.append(
            f'<line x1="{LEFT + CELL}" y1="{base}" x2="{WIDTH - 16}" y2="{base}" stroke="#d0d7de"/>'
        )
        out.append(bars(base, heights, colour))
    out.append("</svg>")
    Path(__file__).with_name("idea.svg").write_text("\n".join(out) + "\n")


def sum_after(probs: list[float], slot: int) -> float:
    """Returns dR/dlog q at a slot (times N): the sum over later prefixes of their products."""
    total, product = 0.0, 1.0
    for k, prob in enumerate(probs):
        product *= prob
        total += product if k >= slot else 0.0
    return total


if __name__ == "__main__":
    main()
