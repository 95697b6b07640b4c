"""Fenced code blocks of the documents, with the lines where they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.fixtures.children import ROOT

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)$")
# Reports that scripts write (`docs/performance/*.md`) quote their command in a line, not in a block.
PATTERNS = ("README.md", "SECURITY.md", "docs/*.md", "model_cards/*/README.md")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: path from the root.
        line: 1-based line of its first line of text.
        language: first word behind the fence, or "".
        text: what stands between the fences, without their indent.
        follows: whether nothing but empty lines parts it from the block before.
    """

    document: str
    line: int
    language: str
    text: str
    follows: bool = True

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    """Every document whose blocks are run, as paths from the root."""
    return sorted({str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern)})


def read_blocks(document: str, text: str | None = None) -> list[Block]:
    """The blocks of a document in order; `text`: its content, if not the file's.

    Raises:
        ValueError: a block is not closed.
    """
    lines = ((ROOT / document).read_text(encoding="utf-8") if text is None else text).splitlines()
    blocks, opened, start, body, follows = [], None, 0, [], False
    for number, line in enumerate(lines, start=1):
        match = FENCE.match(line)
        if opened is None:
            if match:
                opened, start, body = match, number + 1, []
            elif line.strip():
                follows = False
        elif match and match["fence"].startswith(opened["fence"]) and not match["info"].strip():
            language = (opened["info"].split() or [""])[0]
            blocks.append(Block(document, start, language, "\n".join(body) + "\n", follows))
            opened, follows = None, True
        else:
            body.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise ValueError(f"{document}:{start - 1}: the block is not closed")
    return blocks
