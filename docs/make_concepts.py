"""Draws docs/block.svg and docs/rounds.svg: `python docs/make_concepts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from make_idea import BLUE, GREEN, GREY, INK, RED, text

WIDTH = 900
PALE_BLUE, PALE_GREEN, PALE_RED, MUTED, LINE = (
    "#dbe7f5",
    "#e8f3ec",
    "#fbe9e7",
    "#6b7280",
    "#d0d7de",
)
BOLD, MIDDLE = 'font-weight="bold"', 'text-anchor="middle"'

RESPONSE = ["Paris", "is", "the", "capital", "of", "France", ",", "and", "its", "heart", "."]
RESPONSE += ["</s>"]
BLOCK_SIZE = 5
DRAFTS = {  # by the anchor's place in the response, as a drafter might have it
    0: ["is", "the", "capital", "in"],
    4: ["Italy", ",", "and", "so"],
    5: [",", "and", "its", "heart"],
    10: ["</s>"],
}


class Round(NamedTuple):
    """One round of the example: where it starts, what is kept, what is emitted."""

    anchor: int
    accepted: int
    emitted: int
    unclipped: int
    matched: int


def rounds() -> list[Round]:
    """Returns the example's rounds, by greedy verification."""
    found, anchor = [], 0
    while anchor < len(RESPONSE) - 1:
        after = RESPONSE[anchor + 1 : anchor + BLOCK_SIZE]
        right = [a == b for a, b in zip(DRAFTS[anchor], after, strict=True)]
        accepted = right.index(False) if False in right else len(right)
        emitted = min(accepted + 1, len(RESPONSE) - 1 - anchor)
        unclipped = accepted + 1 if emitted == accepted + 1 else BLOCK_SIZE
        found.append(Round(anchor, accepted, emitted, unclipped, sum(right)))
        anchor += emitted
    return found


def figures() -> list[tuple[str, int, int]]:
    """Returns what is reported of the example: a name, a sum, and the sum it is divided by."""
    all_rounds = rounds()
    count = len(all_rounds)
    accepted = sum(one.accepted for one in all_rounds)
    matched = sum(one.matched for one in all_rounds)
    return [
        ("accepted length = emitted / rounds", sum(one.emitted for one in all_rounds), count),
        ("accepted per round", accepted, count),
        ("accepted length, unclipped", sum(one.unclipped for one in all_rounds), count),
        ("waste ratio = thrown away / all right drafts", matched - accepted, matched),
    ]


def box(x: float, y: float, width: float, body: str, fill: str, colour: str = "#ffffff") -> str:
    """Returns a token's box."""
    body = body.replace("<", "&lt;")
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="30" rx="5" fill="{fill}"/>'
    return shape + text(x + width / 2, y + 20, body, 13, colour, MIDDLE)


def arrow(x: float, y1: float, y2: float) -> str:
    """Returns an arrow down."""
    return (
        f'<path d="M{x} {y1} V{y2} m-4 -6 l4 6 l4 -6" fill="none" stroke="{MUTED}" '
        'stroke-width="1.5"/>'
    )


def picture(height: int, parts: list[str]) -> str:
    """Returns an SVG file of these parts on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def block() -> str:
    """Returns the picture of what a block's slots see and predict."""
    left, cell, gap = 200, 58, 24
    context = ["What", "is", "6", "x", "7", "?"]
    slots = ["It", "mask", "mask", "mask", "mask"]
    drafts = ["is", "42", ".", "</s>"]
    taps, layers = (1, 3, 5), range(8)
    xs = [left + i * cell for i in range(len(context))]
    block_xs = [left + len(context) * cell + gap + k * cell for k in range(len(slots))]
    width = len(context) * cell - 6
    parts = [text(14, 30, "One draft: what a block's slots see and predict", 18, INK, BOLD)]
    parts += [text(14, 76, "context: prompt and", 14), text(14, 94, "what is written so far", 14)]
    parts += [
        box(x, 64, cell - 6, word, PALE_BLUE, INK) for x, word in zip(xs, context, strict=True)
    ]
    for layer in layers:
        y, tapped = 112 + 17 * layer, layer in taps
        fill = BLUE if tapped else "#eceff2"
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="13" rx="3" fill="{fill}"/>')
        if tapped:
            parts.append(text(left + width / 2, y + 11, f"tap: layer {layer}", 10, "#fff", MIDDLE))
    parts += [text(14, 170, "target, frozen:", 14), text(14, 188, "one pass, layers 0 to 7", 14)]
    parts += [arrow(x + cell / 2 - 3, 250, 270) for x in xs]
    parts += [
        text(14, 286, "context features: taps", 14),
        text(14, 304, "side by side, fc, norm", 14),
    ]
    parts += [box(x, 274, cell - 6, f"f{i}", BLUE) for i, x in enumerate(xs)]
    parts.append(box(block_xs[0], 274, cell - 6, slots[0], BLUE))
    parts += [box(x, 274, cell - 6, "mask", GREY) for x in block_xs[1:]]
    parts.append(text(block_xs[0], 206, "block: K = 5 slots", 14, INK, BOLD))
    parts.append(text(block_xs[0], 228, "slot 0 is the anchor, the last", 13, MUTED))
    parts.append(text(block_xs[0], 244, "token; the target has not", 13, MUTED))
    parts.append(text(block_xs[0], 260, "read it yet", 13, MUTED))
    parts += [arrow(x + cell / 2 - 3, 308, 328) for x in [*xs, *block_xs]]
    whole = block_xs[-1] + cell - 6 - left
    parts.append(
        f'<rect x="{left}" y="332" width="{whole}" height="44" rx="6" fill="{PALE_GREEN}"/>'
    )
    parts.append(
        text(
            left + whole / 2,
            359,
            "every slot sees the features before the anchor, and all slots of its own block",
            14,
            INK,
            MIDDLE,
        )
    )
    parts.append(text(14, 359, "drafter: one pass", 14))
    parts += [arrow(x + cell / 2 - 3, 380, 400) for x in block_xs[1:]]
    parts += [
        box(x, 404, cell - 6, word, GREEN) for x, word in zip(block_xs[1:], drafts, strict=True)
    ]
    parts += [
        text(x + cell / 2 - 3, 450, f"k = {k}", 12, MUTED, MIDDLE)
        for k, x in enumerate(block_xs[1:], start=1)
    ]
    parts.append(
        text(14, 424, "the target's own head: slot k predicts the token at anchor + k", 14)
    )
    return picture(466, parts)


def accepted_length() -> str:
    """Returns the picture of a response's rounds and what is counted of them."""
    left, cell = 84, 54
    xs = [left + i * cell for i in range(len(RESPONSE))]
    right = left + len(RESPONSE) * cell + 8
    parts = [text(14, 30, "A response, round by round (K = 5): what is counted", 18, INK, BOLD)]
    parts.append(text(14, 72, "response", 14))
    parts += [
        box(x, 52, cell - 6, word, BLUE if i == 0 else PALE_BLUE, "#ffffff" if i == 0 else INK)
        for i, (x, word) in enumerate(zip(xs, RESPONSE, strict=True))
    ]
    parts.append(text(left, 100, "by prefill: in no round", 12, BLUE))
    for number, one in enumerate(rounds(), start=1):
        y = 66 + 50 * number
        parts.append(text(14, y + 20, f"round {number}", 14))
        parts.append(
            f'<rect x="{xs[one.anchor] + 1}" y="{y + 1}" width="{cell - 8}" height="28" rx="5" '
            f'fill="none" stroke="{BLUE}" stroke-width="2"/>'
        )
        parts.append(text(xs[one.anchor] + cell / 2 - 3, y + 20, "anchor", 12, BLUE, MIDDLE))
        for k, word in enumerate(DRAFTS[one.anchor], start=1):
            place = one.anchor + k
            kept, error = k <= one.accepted, k == one.accepted + 1
            fill = GREEN if kept else RED if error else GREY
            parts.append(box(xs[place], y, cell - 6, word, fill))
            if not kept and not error and word == RESPONSE[place]:
                parts.append(text(xs[place] + cell / 2 - 3, y + 43, "right", 11, MUTED, MIDDLE))
        own = one.anchor + one.accepted + 1
        if one.emitted > one.accepted:
            bonus = one.accepted == BLOCK_SIZE - 1
            if bonus:
                parts.append(box(xs[own], y, cell - 6, RESPONSE[own], PALE_GREEN, INK))
            said = "bonus" if bonus else f"&#8594; {RESPONSE[own]}"
            colour = GREEN if bonus else RED
            parts.append(text(xs[own] + cell / 2 - 3, y + 43, said, 11, colour, MIDDLE))
        cut = "" if one.emitted > one.accepted else ", cut"
        parts.append(text(right, y + 20, f"{one.accepted} + {one.emitted - one.accepted}{cut}", 14))
    parts.append(text(right, 72, "accepted + the target's", 12, MUTED))
    parts.append(f'<line x1="14" y1="306" x2="{WIDTH - 16}" y2="306" stroke="{LINE}"/>')
    for row, (name, total, over) in enumerate(figures()):
        y = 332 + 24 * row
        parts.append(text(14, y, name, 14, INK, BOLD if row == 0 else ""))
        parts.append(text(360, y, f"{total} / {over} = {total / over:.2f}", 14))
    return picture(420, parts)


def main(folder: Path = Path(__file__).parent) -> None:
    """Writes the pictures."""
    (folder / "block.svg").write_text(block())
    (folder / "rounds.svg").write_text(accepted_length())


if __name__ == "__main__":
    main()
