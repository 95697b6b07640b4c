"""`semtoken inspect` as people call it."""

from __future__ import annotations

import json
import re

import pytest

from semtoken_hf.cli.main import main
from tests.fixtures.pages import data_of
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.inspection.conftest import FOLDER

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def record(capsys, *arguments):
    main(["inspect", str(FOLDER), *map(str, arguments), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def fails(capsys, code, *arguments):
    """What is said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(["inspect", *map(str, arguments)])
    assert end.value.code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_in_the_terminal(text_file, capsys):
    main(["inspect", str(FOLDER), str(text_file)])
    shown = capsys.readouterr().out
    assert shown.startswith("{<s>It is")
    assert "at 2.4 tokens per slot" in shown
    rows = [line.split()[0] for line in shown.splitlines() if re.search(r" (met|not met \(\d+\)) *$", line)]
    assert rows == ["1.5", "2", "2.4", "3", "4", "6", "8"]
    assert "\x1b" not in shown


def test_a_page_of_the_same_plans(text_file, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    found = record(capsys, text_file, "--html", page, "--target-ratio", 4, 1.5)
    assert found["html"] == str(page)
    data = data_of(page.read_text(encoding="utf-8"))
    assert "".join(data["pieces"][1:]) == PROSE
    assert [plan["ratio"] for plan in data["plans"]] == [plan["target_ratio"] for plan in found["plans"]] == [1.5, 4.0]
    assert data["shown"] == 1  # the ratio that is named first
    assert "prose.txt" in page.read_text(encoding="utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_a_question_stays_whole_and_steers(text_file, capsys):
    plain = record(capsys, text_file, "--target-ratio", 3)
    asked = record(capsys, text_file, "--target-ratio", 3, "--question", "Who has taken it?")
    (reasons,) = [plan["reasons"] for plan in asked["plans"]]
    assert reasons["question"] > 3
    assert asked["plans"][0]["tokens"] > plain["plans"][0]["tokens"]
    question = ("--target-ratio", 3, "--question", "Who has taken it?")
    assert asked["notes"] == []
    assert "does not decide" in record(capsys, text_file, *question, "--set", "query_weight=0")["notes"][0]


def test_a_chat(tmp_path, capsys):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--text", "the cat sat on the mat " * 9, "--chat", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][0]["reasons"]["marked"] >= 6


def test_fields_of_the_configuration(text_file, capsys):
    found = record(capsys, text_file, "--set", "segmentation_mode=uniform", "max_span_length=3")
    assert max(plan["longest"] for plan in found["plans"]) == 3
    assert "not met: 2.4, 3, 4, 6, 8;" in found["notes"][0]
    by_tau = ("segmentation_mode=greedy", "target_ratio=null", "similarity_threshold=0.6")
    (plan,) = record(capsys, text_file, "--set", *by_tau)["plans"]
    assert plan["target_ratio"] is None


def test_wrong_usage(text_file, capsys):
    assert "give the text once" in fails(capsys, 2, FOLDER)
    assert "give the text once" in fails(capsys, 2, FOLDER, text_file, "--text", "both")
    assert "target-ratio" in fails(capsys, 2, FOLDER, text_file, "--target-ratio", 0.5)
    assert "set" in fails(capsys, 2, FOLDER, text_file, "--set", "novalue")


def test_what_cannot_be_done(text_file, tmp_path, capsys):
    assert "no fields ['max_spam']" in fails(capsys, 1, FOLDER, text_file, "--set", "max_spam=3")
    assert "num_sink_tokens" in fails(capsys, 1, FOLDER, text_file, "--set", "num_sink_tokens=-3")
    assert "missing.txt" in fails(capsys, 1, FOLDER, tmp_path / "missing.txt")
    assert "chat template" in fails(capsys, 1, FOLDER, text_file, "--chat")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fails(capsys, 1, FOLDER, tmp_path / "bytes.txt")
    (tmp_path / "plain").mkdir()
    assert fails(capsys, 1, tmp_path / "plain", text_file).count("\n") == 1


def test_a_page_that_cannot_be_written_leaves_nothing(text_file, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "inside").touch()
    assert fails(capsys, 1, FOLDER, text_file, "--html", taken).startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prose.txt", "taken"]
