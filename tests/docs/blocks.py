"""The code blocks of a Markdown page, in order, each with what the comment before it says.

<!-- file: NAME -->     the block is written to NAME in the page's folder
<!-- shown: REASON -->  it is not run, only checked, for a reason that stands there
<!-- run -->, <!-- tests -->  the README's two first lines, which others run
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>\w+)(?:: (?P<words>[^\n]*?))? -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
LANGUAGES = {"bash", "ini", "json", "python", "text", "toml"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    file: str | None = None
    shown: str | None = None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[str]:
        """Yield the lines of a shell block that call fedlora, each joined over its backslashes."""
        joined = self.text.replace("\\\n", " ")
        for line in joined.splitlines():
            for command in line.split("&&"):
                words = command.strip().removeprefix("sudo -u fedlora /opt/fedlora/bin/")
                words = words.removeprefix(".venv/bin/")
                if words.startswith("fedlora "):
                    yield words


def blocks(page: str) -> list[Block]:
    """Return a page's blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        mark, words = match["mark"], match["words"] or ""
        if mark in ("run", "tests"):
            mark, words = "shown", "in a new environment, by .ci/run"
        marks = {mark: words} if mark in ("file", "shown") else {}
        found.append(Block(page, line, match["language"], match["text"], **marks))
    return found
