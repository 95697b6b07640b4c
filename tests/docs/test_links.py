"""Links inside the repository lead somewhere."""

from __future__ import annotations

import re
import unicodedata

from tests.docs.blocks import documents
from tests.fixtures.children import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    kept = "".join(c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return kept.replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings."""
    return {anchor(line.lstrip("#")) for line in FENCED.sub("", text).splitlines() if re.match(r"#+ ", line)}


def broken_links(document: str, text: str) -> list[str]:
    """Relative links of a document that lead nowhere."""
    broken = []
    for match in LINK.finditer(FENCED.sub("", text)):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, place = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        is_there = target.exists()
        if is_there and place:
            is_there = target.suffix == ".md" and place in anchors(target.read_text() if path else text)
        if not is_there:
            broken.append(link)
    return broken


def test_relative_links_resolve():
    broken = {name: broken_links(name, (ROOT / name).read_text(encoding="utf-8")) for name in documents()}
    assert {name: links for name, links in broken.items() if links} == {}


def test_every_document_can_be_found():
    """The table of contents names what is to be read; reports are linked from where their figures are used."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents()}
    contents = texts["docs/README.md"]
    assert [p.name for p in (ROOT / "examples").glob("*.py") if f"](../examples/{p.name})" not in contents] == []
    for path in (ROOT / "docs").rglob("*.md"):
        others = "".join(text for name, text in texts.items() if ROOT / name != path)
        assert path.name == "README.md" or f"{path.relative_to(ROOT / 'docs')}" in others, path
