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


class Command(NamedTuple):
    """A command as a page shows it: its words, without comments."""

    page: str
    words: tuple[str, ...]

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
    blocks = [(body, kind) for kind, body in _FENCE.findall(text) if not kind.startswith("{")]
    text = _FENCE.sub("", text)
    blocks += [(body, "") for body in _INDENTED.findall(text)]
    for body, kind in blocks:
        assert kind in ("", "sh"), f"{name}: commands stand in ``` or ```sh, not ```{kind}"
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert words[0] in PROGRAMS, f"{name}: {line!r} is no command"
                found.append(Command(name, tuple(words)))
    for quoted in _INLINE.findall(_INDENTED.sub("", text)):
        words = quoted.split()
        if words[0] in PROGRAMS and len(words) > (3 if words[1:2] == ["-m"] else 1):
            found.append(Command(name, tuple(shlex.split(quoted.replace("\n", " ")))))
    return found
