"""How commands end: which errors are the user's, one line for each, streams kept apart."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tqdm.auto import tqdm

from semtoken_hf.cli.output import bars, close_bars, console, ending_well, only_json, write_json
from semtoken_hf.configuration_semtoken import check_ratio
from tests.fixtures.children import environment, run


def raise_value_error(*_: object) -> None:
    raise ValueError("this is \n  wrong")


def raise_safetensor_error() -> None:
    raise SafetensorError("header")


def missing_file() -> None:
    Path("/nowhere/at/all").read_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (raise_value_error, "error: this is wrong\n"),
        (lambda: check_ratio(0.5), "error: `target_ratio` must be"),
        (missing_file, "error: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        (lambda: json.loads("{"), "error: a JSON file is damaged"),
        (raise_safetensor_error, "error: a safetensors file is damaged (header): `semtoken doctor FOLDER` says which"),
        (lambda: torch.zeros(2) @ torch.zeros(3), "error: inconsistent tensor size"),
        (lambda: __import__("no_such_package"), "error: No module named"),
        (lambda: (_ for _ in ()).throw(HTTPError("gone")), "error: the Hub cannot be reached (gone)"),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("40 GB.")), "error: 40 GB. Use a higher"),
    ],
)
def test_what_the_input_is_to_blame_for_is_one_line(call, message, capsys):
    with pytest.raises(SystemExit) as stopped, ending_well():
        call()
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: (lambda a: a)(), TypeError),
        (lambda: {}["x"], KeyError),
        (lambda: torch.zeros(2).softmax(7), IndexError),
        (lambda: None.x, AttributeError),
    ],
)
def test_a_bug_keeps_its_traceback(call, kind):
    with pytest.raises(kind), ending_well():
        call()


def test_the_traceback_can_be_had(capsys, monkeypatch):
    monkeypatch.setenv("SEMTOKEN_TRACEBACK", "1")
    with pytest.raises(SystemExit), ending_well():
        raise_value_error()
    err = capsys.readouterr().err
    assert "in raise_value_error" in err
    assert err.endswith("error: this is wrong\n")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_with_one_line(number, code, word, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, ending_well("all is kept"):
        os.kill(os.getpid(), number)
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"{word}; all is kept\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_has_a_line_of_its_own_behind_a_bar(capsys):
    bar = tqdm(total=3, desc="working")
    with pytest.raises(SystemExit), ending_well():
        raise_value_error(bar.update())
    assert capsys.readouterr().err.splitlines()[-1] == "error: this is wrong"
    close_bars()


def test_one_object_is_all_that_comes_out(capsys):
    with only_json(True) as answer:
        print("hello")
        answer({"a": "ü", "path": os})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": "ü", "path": str(os)}
    assert err == "hello\n"
    with only_json(False) as answer:
        print("hello")
        answer({"a": 1})
    assert capsys.readouterr().out == "hello\n"


def test_nothing_comes_out_of_what_fails(capsys):
    with pytest.raises(SystemExit), ending_well(), only_json(True) as answer:
        raise_value_error(answer({"a": 1}))
    assert capsys.readouterr().out == ""


CHILD = """
import os, subprocess, sys
sys.modules["semtoken_hf"] = type(sys)("semtoken_hf")
sys.modules["semtoken_hf"].__path__ = [sys.argv[1]]
from semtoken_hf.cli.output import only_json
with only_json(True) as answer:
    os.write(1, b"from C\\n")
    subprocess.run(["echo", "from a child"])
    answer({"a": 1})
"""


def test_libraries_in_c_and_children_write_to_standard_error():
    folder = os.path.dirname(os.path.dirname(sys.modules["semtoken_hf.cli.output"].__file__))
    done = run([sys.executable, "-c", CHILD, folder], environment())
    assert done.stdout == '{"a": 1}\n'
    assert done.stderr == "from C\nfrom a child\n"


def test_quiet_hides_every_bar(capsys):
    with bars(quiet=True):
        assert os.environ["TQDM_DISABLE"] == "1"
        list(tqdm(range(3), desc="hidden"))
    assert capsys.readouterr().err == ""
    assert "TQDM_DISABLE" not in os.environ
    list(tqdm(range(3), desc="shown"))
    assert "shown" in capsys.readouterr().err


def test_json_keeps_letters_and_writes_paths(capsys):
    write_json({"text": "größe\u2028"})
    assert json.loads(capsys.readouterr().out) == {"text": "größe\u2028"}


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({"FORCE_COLOR": "1"}, True), ({}, False), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals_and_can_be_refused(monkeypatch, capsys, variables, coloured):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    console().print("fault", style="red")
    assert ("\x1b[31m" in capsys.readouterr().out) == coloured


def test_long_lines_are_not_broken_in_a_pipe(capsys):
    console().print("/a/long/path" * 40)
    assert capsys.readouterr().out == "/a/long/path" * 40 + "\n"
