"""The code that a checkpoint carries, by its SHA-256: in its card, in a release, and compared with this package.

This file needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"
# As Transformers finds what a module needs.
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)
CUSTOM_GENERATE = "custom_generate/generate.py"
# What `auto_map` of a checkpoint names.
ENTRY_POINTS = ("configuration_semtoken_*.py", "modeling_semtoken_*.py", "tokenization_semtoken_fast.py")


@dataclass(frozen=True)
class ModuleComparison:
    """The modules of a checkpoint folder beside those of this package, by file name.

    Attributes:
        same: of the same bytes.
        changed: of other bytes.
        missing: that `auto_map` or a module of the folder names and the folder lacks.
        foreign: that this package does not ship. Loading runs one only where another module or `auto_map` names it.
    """

    same: tuple[str, ...]
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether the folder holds code, all of it this package's, and none is missing."""
        return bool(self.same) and not (self.changed or self.missing or self.foreign)

    def describe(self) -> str:
        """What differs, as a phrase; empty if nothing does."""
        named = {"changed": self.changed, "missing": self.missing, "foreign": self.foreign}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in named.items() if names)


def package_version() -> str:
    """Of this package; "unknown" where it is neither installed nor in its repository."""
    project = PACKAGE.parents[1] / "pyproject.toml"
    if project.is_file() and (found := re.search(r'^version = "(.+)"', project.read_text("utf-8"), re.MULTILINE)):
        return found[1]
    try:
        return version("semtoken-hf")
    except PackageNotFoundError:
        return "unknown"


def module_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each Python file, by name, sorted."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix == ".py"}
    return dict(sorted(found.items()))


def needed_modules(folder: Path, names: Iterable[str]) -> set[str]:
    """File names of `names` and of everything that they import from their folder, whether it is there or not."""
    waiting, found = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8", errors="replace")
                waiting += [f"{a or b}.py" for a, b in RELATIVE_IMPORT.findall(text)]
    return found


def named_modules(folder: Path) -> set[str]:
    """File names that `auto_map` of a folder's configurations names; none where they cannot be read."""
    found = set[str]()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            classes = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
            values = [c for value in classes.values() for c in (value if isinstance(value, list) else [value])]
            found |= {f"{c.split('.')[0]}.py" for c in values if isinstance(c, str) and "--" not in c}
        except (OSError, ValueError, AttributeError):
            continue
    return found


def shipped_modules(package: Path = PACKAGE) -> list[Path]:
    """The modules that checkpoints of all families carry."""
    entries = (file.name for pattern in ENTRY_POINTS for file in package.glob(pattern))
    return [package / name for name in sorted(needed_modules(package, entries))]


def compare_modules(folder: Path, package: Path = PACKAGE) -> ModuleComparison:
    """The modules at the top of a checkpoint folder, compared with what `package` would ship.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    ours, theirs = module_hashes(shipped_modules(package)), module_hashes(folder.glob("*.py"))
    # Transformers runs it instead of `generate` of classes that are not SemToken's.
    below = [CUSTOM_GENERATE] if (folder / CUSTOM_GENERATE).is_file() else []
    return ModuleComparison(
        same=tuple(name for name in theirs if ours.get(name) == theirs[name]),
        changed=tuple(name for name in theirs if name in ours and ours[name] != theirs[name]),
        missing=tuple(sorted(needed_modules(folder, named_modules(folder) | theirs.keys()) - theirs.keys())),
        foreign=(*(name for name in theirs if name not in ours), *below),
    )


def checksum_lines(hashes: dict[str, str]) -> str:
    """As `sha256sum` prints and reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items())


def modules_section(hashes: dict[str, str]) -> str:
    """The section of a card on the code that it carries, between its markers."""
    ours = module_hashes(shipped_modules())
    others = [name for name, digest in hashes.items() if ours.get(name) != digest]
    origin = f"They are those of semtoken-hf {package_version()}."
    if others:
        origin = (
            f"**Not those of semtoken-hf {package_version()}**, with which this list was made: {', '.join(others)}."
        )
    return f"""{BEGIN}
## Code in this repository

`trust_remote_code=True` runs the modules below and no other file. {origin}
Compare them with the `MODULES.sha256` of a release, or run `semtoken doctor FOLDER`; `sha256sum -c` reads these lines:

```text
{checksum_lines(hashes)}```
{END}"""


def with_modules(card: str, hashes: dict[str, str]) -> str:
    """A card's text with the section on these modules: in place of an earlier one, else at the end.

    Raises:
        ValueError: the card has one of the markers without the other, several, or in the wrong order.
    """
    section = modules_section(hashes)
    if BEGIN not in card and END not in card:
        return f"{card.rstrip()}\n\n{section}\n"
    if card.count(BEGIN) != 1 or card.count(END) != 1 or card.index(BEGIN) > card.index(END):
        raise ValueError(f"the card needs {BEGIN} and {END} once each, in this order, or neither")
    return card.partition(BEGIN)[0] + section + card.partition(END)[2]


__all__ = ["ModuleComparison", "compare_modules", "module_hashes", "needed_modules", "shipped_modules", "with_modules"]
