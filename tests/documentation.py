"""What README and docs say: their pages, their links, and every command that they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.runs import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("results/*.md"))]
PROGRAMS = ("python", "torchrun", "make", "tensorboard")

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_INLINE = re.compile(r"`([^`]+)`")
_COMMENT = re.compile(r"(?:^|\s)#(.*)")
_IN_COMMENT = {"GPU": re.compile(r"\bGPUs?\b"), "network": re.compile(r"\bnetwork\b")}
# in text, "one H100, 2026-11-26" says which card gave a figure, not that there must be one
_IN_TEXT = _IN_COMMENT | {
    "GPU": re.compile(r"\b(?:on|needs?) (?:an?|one|two|several) (?:GPU|H[12]00)s?\b|# GPU")
}


class Command(NamedTuple):
    """A command as a page shows it: its words, without comments.

    `needs` are those of "GPU" and "network" that the page tells its reader: in the command's
    comment, in a line of comment above it in the same block, or, in text, in its paragraph or row,
    where that says what it runs on.
    """

    page: str
    words: tuple[str, ...]
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands(page: Path) -> list[Command]:
    """Returns the commands of a page, in order: of fenced and indented blocks, then those in text.

    In text, a program without arguments is a name, no command.

    Raises:
        AssertionError: A shell block holds a line that is no command.
    """
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    found = []
    # of an indented block the paragraph above it speaks
    blocks = [(body, kind, "") for kind, body in _FENCE.findall(text) if not kind.startswith("{")]
    text = _FENCE.sub("", text)
    for block in _INDENTED.finditer(text):
        blocks.append((block.group(), "", text[: block.start()].rstrip().rpartition("\n\n")[2]))
    for body, kind, above in blocks:
        told = ""  # by the line of comment above
        assert kind in ("", "sh"), f"{name}: commands stand in ``` or ```sh, not ```{kind}"
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            comment = "".join(_COMMENT.findall(line))
            if words:
                assert words[0] in PROGRAMS, f"{name}: {line!r} is no command"
                marks = _marks(above, _IN_TEXT) | _marks(told + comment, _IN_COMMENT)
                found.append(Command(name, tuple(words), marks))
            else:
                told = comment
    for paragraph in re.split(r"\n\n|\n(?=\|)", _INDENTED.sub("", text)):
        for quoted in _INLINE.findall(paragraph):
            words = quoted.split()
            if words[0] in PROGRAMS and len(words) > (3 if words[1:2] == ["-m"] else 1):
                words = shlex.split(quoted.replace("\n", " "))
                found.append(Command(name, tuple(words), _marks(paragraph, _IN_TEXT)))
    return found


def _marks(said: str, marks: dict[str, re.Pattern[str]]) -> frozenset[str]:
    return frozenset(need for need, mark in marks.items() if mark.search(said))
