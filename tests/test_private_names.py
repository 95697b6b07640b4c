"""Private names of other libraries: all of them are listed, and all of them are where the list says."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import semtoken_hf
from semtoken_hf.private_names import PRIVATE_NAMES

SOURCE = Path(semtoken_hf.__file__).parent
# Releases that came before a name have to do without it: their calls look it up with a default.
OPTIONAL = ("_mask_length", "_pp_stage")


def owner_of(path):
    """The module or class at a dotted path; skips where its library is not installed."""
    parts = path.split(".")
    pytest.importorskip(parts[0])
    for end in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("private", [p for p in PRIVATE_NAMES if p.name not in OPTIONAL], ids=lambda p: p.name)
def test_it_is_where_the_list_says(private):
    owner = owner_of(private.owner)
    assert hasattr(owner, private.name) or private.name in inspect.getsource(owner)


def names_of(tree):
    """Private names that a module defines, and those that it uses or overrides."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Name, ast.arg)):
            defined.add(node.id if isinstance(node, ast.Name) else node.arg)
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            (defined if is_own else used).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            used |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    overridden = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "super"
    }
    return defined, used, overridden


def test_every_one_is_listed():
    defined, used, overridden = set(), set(), set()
    for file in SOURCE.rglob("*.py"):
        mine, theirs, supers = names_of(ast.parse(file.read_text()))
        defined, used, overridden = defined | mine, used | theirs, overridden | supers
    foreign = {name for name in (used - defined) | overridden if name.startswith("_") and not name.startswith("__")}
    assert foreign <= {private.name for private in PRIVATE_NAMES}


def test_every_one_is_used():
    text = "\n".join(f.read_text() for f in SOURCE.rglob("*.py") if f.name != "private_names.py")
    assert not [private.name for private in PRIVATE_NAMES if private.name not in text]
