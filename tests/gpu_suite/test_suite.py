"""The suite as a whole: whatever happens to a part, the others run and nothing that was found is lost."""

import json
import sys
import time

import torch

from semtoken_hf.gpu_suite import command, suite
from semtoken_hf.gpu_suite.parts import Part
from semtoken_hf.gpu_suite.report import Report
from semtoken_hf.gpu_suite.suite import run_parts, supervise
from tests.fixtures.children import ROOT, environment

TITLES = {name: f"Title of {name}" for name in ("first", "second", "third")}


def part(name, run, seconds=10, least=0.1):
    return Part(name, TITLES[name], run, seconds, least)


def good(context):
    context.row(figure="a|b", value=1.5)
    context.note("It went well.")
    context.check("it holds", True)


def run(context, tmp_path, *parts, seconds=60):
    report = Report.start(tmp_path / "r.json", TITLES)
    assert run_parts(context, report, time.time() + seconds, parts)
    return json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.md").read_text()


def test_a_part_that_fails_costs_nothing_else(context, tmp_path):
    def failing(context):
        context.row(figure="before", value=1)
        raise RuntimeError("device-side assert")

    report, markdown = run(context, tmp_path, part("first", good), part("second", failing), part("third", good))
    parts = report["parts"]
    assert [p["status"] for p in parts.values()] == ["done", "failed", "done"]
    assert parts["second"]["rows"] == [{"figure": "before", "value": 1}]
    assert "device-side assert" in parts["second"]["traceback"]
    assert parts["first"]["rows"] == parts["third"]["rows"] == [{"figure": "a|b", "value": 1.5}]
    assert not report["passed"]
    assert {"command", "versions", "machine", "date"} <= report["provenance"].keys()
    assert "| Title of second | failed: RuntimeError: device-side assert |" in markdown
    assert "| a/b | 1.5 |" in markdown
    assert "- It went well." in markdown


def test_a_check_that_does_not_hold(context, tmp_path):
    parts = [part("first", good), part("second", lambda c: c.check("law", False)), part("third", good)]
    report, markdown = run(context, tmp_path, *parts)
    assert not report["passed"]
    assert "- does NOT hold: law" in markdown
    parts[1] = part("second", good)
    report, _ = run(context, tmp_path, *parts)
    assert report["passed"]


def test_parts_that_do_not_fit_any_more_are_skipped(context, tmp_path):
    parts = [part("first", good), part("second", good, least=1000), part("third", good)]
    report, markdown = run(context, tmp_path, *parts)
    assert [p["status"] for p in report["parts"].values()] == ["done", "skipped", "done"]
    assert "no time left" in markdown
    assert report["passed"]


# Does to the report what `run_part` does, without loading anything.
WORKER = """
import json, os, sys, time

def update(name, **fields):
    report["parts"][name] |= fields
    with open(path + ".new", "w") as file:
        json.dump(report, file)
    os.replace(path + ".new", path)

path = sys.argv[1]
report = json.load(open(path))
for name, part in report["parts"].items():
    if part["status"] == "pending":
        update(name, status="running", limit=time.time() + (0.3 if name == "second" else 50), rows=[{"found in": name}])
        if name == "first":
            os._exit(9)
        if name == "second":
            time.sleep(100)
        update(name, status="done")
"""


def test_killed_and_hanging_workers_cost_their_part_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "CLOSING", 0.5)
    report, deadline = Report.start(tmp_path / "r.json", TITLES), time.time() + 100
    report = supervise([sys.executable, "-c", WORKER, str(report.output)], report, deadline, {})
    assert [p["status"] for p in report.parts.values()] == ["killed", "killed", "done"]
    assert [p["reason"] for p in list(report.parts.values())[:2]] == [
        "its process ended with code 9",
        "it ran beyond its time",
    ]
    assert [p["rows"] for p in report.parts.values()] == [[{"found in": name}] for name in TITLES]
    assert not report.passed


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--output", str(tmp_path / "r.json")]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_on_a_processor(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "r.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--long-length", "512", "--dtype", "float32"]
    options += ["--parts", "environment", "million_tokens", "--output", str(output)]
    # Its worker is the script in another process.
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "gpu_suite.py"), *options])
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    assert command.main() == 0
    report = json.loads(output.read_text())
    assert {name: p["status"] for name, p in report["parts"].items()} == {
        "environment": "done",
        "million_tokens": "done",
    }
    assert report["provenance"]["command"].startswith("python scripts/gpu_suite.py --device cpu")
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == ["r.json", "r.md"]
