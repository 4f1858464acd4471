"""The fenced blocks of README and of the site's pages."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
# Reports that are written by commands, and the diary, which tells of earlier versions.
NOT_RUN = ("performance.md", "results.md", "reliability.md")
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
      language: after the fence.
      title: of the block; that of Python is the file it is saved as.
      text: inside.
      line: of its first line in the page.
    """

    language: str
    title: str
    text: str
    line: int


def blocks(page: pathlib.Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text()
    return [
        Block(match[1], match[2] or "", match[3], text.count("\n", 0, match.start(3)) + 1)
        for match in FENCE.finditer(text)
    ]


def pages() -> list[pathlib.Path]:
    """README and the pages whose blocks are run."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *(page for page in docs if page.name not in NOT_RUN)]


def needs_of(page: pathlib.Path) -> list[str]:
    """Arguments of `train_and_evaluate` without which a page cannot run, from its comment `<!-- needs: a, b -->`."""
    match = re.search(r"<!-- needs: (.*?) -->", page.read_text())
    return match[1].split(", ") if match else []
