"""What a report consists of, before it is HTML or Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

# Stands where nothing was measured.
MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """Entry of a table.

    Attributes:
        text: the figure.
        note: a lesser figure beneath it.
        best: of its column.
    """

    text: str
    note: str = ""
    best: bool = False

    @property
    def is_empty(self) -> bool:
        return self.text == MISSING and not self.note


@dataclass(frozen=True)
class Row:
    """Row of a table; rows of one `group` follow each other under its name."""

    label: str
    cells: list[Cell]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading above it.
        text: sentence under the heading; may be empty.
        columns: (name, lesser text beneath it); the first is the one of the labels.
        rows: in order.
    """

    kind: ClassVar[str] = "table"
    title: str
    text: str
    columns: list[tuple[str, str]]
    rows: list[Row]


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Listing:
    """Text shown as it is, such as a command."""

    kind: ClassVar[str] = "listing"
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: of its files.
        title: says what it shows.
        text: sentence beneath it; may be empty.
        svg: for a page: no background, text in the page's colour.
        svg_file, png_file: for files, on white.
        small: one of several side by side, and left out of Markdown.
    """

    kind: ClassVar[str] = "plot"
    name: str
    title: str
    text: str
    svg: str
    svg_file: str
    png_file: bytes
    small: bool = False


@dataclass(frozen=True)
class Fold:
    """Blocks that open on demand."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: list[Block]


Block = Table | Paragraph | Listing | Plot | Fold


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        name: the anchor.
        title: the heading.
        blocks: in order.
        alarming: the page sets it off.
    """

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    alarming: bool = False
