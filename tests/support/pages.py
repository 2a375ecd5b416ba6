"""The commands and Python examples in README.md and docs/, as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

SHELL, PYTHON = {"sh", "bash", "console", ""}, {"python", "py"}
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


class Example(NamedTuple):
    """One command, or one block of Python."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[str, Example]]:
    """Each fenced block of a page, with its language."""
    language, begin, held = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = re.fullmatch(r"```(\S*)", line)
        if fence is None:
            held.append(line)
        elif language is None:
            language, begin, held = fence[1], number + 1, []
        else:
            yield language, Example(page.name, begin, "\n".join(held))
            language = None
    assert language is None, f"{page.name}: the block of line {begin} does not end"


def commands(page: Path) -> Iterator[Example]:
    """Each command of a page's shell blocks, without comments; joined by `&&` they are several."""
    for language, block in blocks(page):
        if language not in SHELL:
            continue
        lines = block.text.replace("\\\n", " " * 2).splitlines()
        for number, line in enumerate(lines, start=block.line):
            for words in split(shlex.split(line, comments=True)):
                yield Example(block.page, number, shlex.join(words))


def split(words: list[str]) -> Iterator[list[str]]:
    """The commands between `&&`."""
    held: list[str] = []
    for word in [*words, "&&"]:
        if word != "&&":
            held.append(word)
        elif held:
            yield held
            held = []


def examples(page: Path) -> Iterator[Example]:
    """Each block of Python of a page."""
    return (block for language, block in blocks(page) if language in PYTHON)


def once(found: Iterator[Example]) -> list[Example]:
    """The first of those that have one text."""
    first: dict[str, Example] = {}
    for example in found:
        first.setdefault(example.text, example)
    return list(first.values())
