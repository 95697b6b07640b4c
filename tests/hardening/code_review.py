"""What a source file could do beyond computing, found in its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

# By what they could do.
DANGEROUS_MODULES = {
    *("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"),  # run what data says
    *("runpy", "code", "codeop", "zipimport", "imp", "pkgutil", "builtins"),  # run code
    *("subprocess", "pty", "asyncio"),  # start processes
    *("ctypes", "_ctypes", "cffi"),  # call C
    *("socket", "socketserver", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "xmlrpc"),
    *("ftplib", "smtplib", "telnetlib", "webbrowser"),
}
# What no shipped module needs, either.
OTHER_MODULES = {
    *("importlib", "multiprocessing", "concurrent", "signal", "gc", "sys", "inspect", "atexit", "os"),
    *("shutil", "tempfile", "glob", "tarfile", "zipfile", "lzma", "gzip", "bz2", "sqlite3", "huggingface_hub"),
}
DANGEROUS_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
DANGEROUS_ATTRIBUTES = {
    *("system", "popen", "fork", "execv", "execve", "execvp", "execl", "spawnl", "spawnv", "posix_spawn", "startfile"),
    *("load_library", "load_inline", "hub", "__globals__", "__builtins__", "__subclasses__", "__code__", "__loader__"),
}
WRITING_ATTRIBUTES = {"write_text", "write_bytes", "unlink", "rmdir", "rename", "touch", "symlink_to", "chmod"}
# Functions that read or write pickle, by what they are called on.
PICKLE_FUNCTIONS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"}


def review(file: Path) -> set[str]:
    """What stands out in a file: dangerous, or unusual for a module that only computes."""
    return dangers(file) | habits(file)


def dangers(file: Path) -> set[str]:
    """What could run code of data, start processes, use the network or call C."""
    found: set[str] = set()
    for node in ast.walk(_tree(file)):
        found |= {f"import {name}" for name in _imported(node) if name.split(".")[0] in DANGEROUS_MODULES}
        found |= {f"import {name}" for name in _imported(node) if name.rpartition(".")[2] in DANGEROUS_ATTRIBUTES}
        if isinstance(node, ast.Name) and node.id in DANGEROUS_NAMES:
            found.add(node.id)
        if isinstance(node, ast.Attribute) and node.attr in DANGEROUS_ATTRIBUTES:
            found.add(f".{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PICKLE_FUNCTIONS:
            safe = any(k.arg == "weights_only" and _value(k.value) is True for k in node.keywords)
            found.add(ast.unparse(node.func) + (" of weights only" if safe else ""))
    return found


def habits(file: Path) -> set[str]:
    """What reaches into the interpreter, imports by name, or changes files."""
    found: set[str] = set()
    for node in ast.walk(_tree(file)):
        found |= {f"import {name}" for name in _imported(node) if name.split(".")[0] in OTHER_MODULES}
        if isinstance(node, ast.Attribute) and node.attr in WRITING_ATTRIBUTES:
            found.add(f".{node.attr}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "import_module":
            module = _value(node.args[0]) if node.args else None
            found.add(f"import_module({module or 'a variable'})")
        if name == "open" and _may_write(node):
            found.add("open for writing")
        if name == "setattr":
            found.add("setattr")
    return found


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imported(node: ast.AST) -> list[str]:
    """Names of modules, and of what is taken out of one, as `os.system`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _may_write(call: ast.Call) -> bool:
    """Whether a call of `open(file, mode)` or `path.open(mode)` has a mode that is not known to read only."""
    place = 0 if isinstance(call.func, ast.Attribute) else 1
    modes = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
    return any(not isinstance(_value(mode), str) or set(_value(mode)) & set("wax+") for mode in modes)


def _value(node: ast.AST) -> object:
    return node.value if isinstance(node, ast.Constant) else None
