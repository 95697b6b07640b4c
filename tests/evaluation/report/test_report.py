import copy
import math
import re
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest

from semtoken_hf.evaluation.report.detail_tables import without_folders
from semtoken_hf.evaluation.report.report import html_page, markdown_section, write_report
from tests.fixtures.metrics import make_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(make_metrics(), folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def pages(metrics):
    """Page and Markdown without plots."""
    return html_page(metrics, None), markdown_section(metrics, None)


def test_the_figures_are_those_of_the_metrics(page, folder):
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    metrics = make_metrics()
    for cell in metrics["cells"]:
        cost = f"{100 * cell['cost']:+,.1f} %"
        level = f"{cell['perplexity']:.2f}" if cell["is_perplexity"] else f"{cell['nll']:.3f}"
        assert re.search(rf"<td[^>]*>{re.escape(cost)}<small>± 1.2; {level}</small></td>", page), cell
        assert f"{cost}** (± 1.2; {level})" in markdown or f"{cost} (± 1.2; {level})" in markdown, cell
        if cell["score"] is not None:
            assert f"<td>{cell['score']:.1f}<small>" in page or f'best">{cell["score"]:.1f}<small>' in page, cell
        assert f"<td>{cell['tokens_per_slot']:.2f}" in page
    assert "<td>75.0<small>38 %</small></td>" in page
    assert "<td>331<small>73 %</small></td>" in page
    assert f"<td>{100 * (math.exp(-0.1) - 1):+.1f} %</td>" in page
    for text in (metrics["alarms"][0], "2027-01-02", "semtoken evaluate --seed 0", "Evaluation of semtoken-llama-tiny"):
        assert text in page
        assert text in markdown


def test_the_page_needs_nothing_from_outside(page):
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", page)
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", page)
    inner = re.findall(r'\sid="([^"]+)"', page)
    assert len(inner) == len(set(inner))
    assert {link[1:] for link in links} <= set(inner)
    assert "/somewhere" not in page


def test_the_inline_plots_are_whole(page, folder):
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    files = {file.name for file in (folder / "plots").iterdir()}
    names = {"cost_by_memory_wikitext", "gain_by_memory", "cost_by_time_wikitext"}
    names |= {"ablation_wikitext_query", "ablation_wikitext_tau"}
    assert files == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert len(drawn) == len(names)
    for svg in drawn:
        ElementTree.fromstring(svg)
    linked = re.findall(r"\(plots/(.*?)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert {"cost_by_memory_wikitext.png", "gain_by_memory.png", "cost_by_time_wikitext.png"} == set(linked)


def test_everything_is_escaped():
    metrics, bad = make_metrics(), "<script>alert(1)</script>|`*"
    for cell in metrics["cells"]:
        cell["title"] = cell["task_title"] = cell["metric"] = bad
    for record in (*metrics["speed"], *metrics["long_contexts"]):
        record["title"] = bad
    metrics["config"]["checkpoint"] = metrics["provenance"]["machine"] = metrics["alarms"][0] = bad
    metrics["provenance"]["command"] = "```\n<script>alert(1)</script>"
    page, markdown = pages(metrics)
    assert "<script" not in page
    assert bad in unescape(page)
    outside = markdown.replace("````bash\n```\n<script>alert(1)</script>\n````", "")
    assert "<script" not in outside
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\`\\*" in outside


def without(name):
    def change(metrics):
        metrics[name] = []

    return change


def drop_references(metrics):
    metrics["cells"] = [c for c in metrics["cells"] if c["method"] not in ("full", "none")]
    for cell in metrics["cells"]:
        for name in ("cost", "spread", "gain_kept", "kv_share", "score_lost"):
            for figures in (cell, *cell.get("groups", {}).values()):
                figures.pop(name, None)


def not_finite(metrics):
    for cell in metrics["cells"]:
        if cell["method"] == "semtoken":
            cell |= {"nll": math.nan, "cost": math.inf, "spread": math.inf, "gain_kept": math.nan}
    metrics["speed"][0]["prefill_ms"] = metrics["long_contexts"][0]["nll"] = math.nan


def one_example(metrics):
    for cell in metrics["cells"]:
        cell["examples"] = 1
        cell.pop("spread")


@pytest.mark.parametrize(
    "change",
    [
        without("cells"),
        without("speed"),
        drop_references,
        not_finite,
        one_example,
    ],
)
def test_missing_parts_are_left_out(change, tmp_path):
    metrics = make_metrics()
    change(metrics)
    before = copy.deepcopy(metrics)
    write_report(metrics, tmp_path)
    assert repr(metrics) == repr(before)
    page, markdown = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for text in (page, markdown):
        assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert ("No alarm." in page) == (not metrics["alarms"])
    assert ('id="speed"' in page) == bool(metrics["speed"])
    assert ('id="long"' in page) == bool(metrics["long_contexts"])
    assert ('id="results"' in page) == bool(metrics["cells"])
    assert ("not finite" in page) == (change is not_finite)


def test_questions_that_were_not_kept_are_named():
    metrics = make_metrics()
    cell = next(c for c in metrics["cells"] if c["method"] == "semtoken" and c["task"] == "hotpotqa")
    cell["question_kept"] = False
    for text in pages(metrics):
        assert "merged or dropped: HotpotQA, SemToken, 2.4 tokens per slot." in text


def test_without_matplotlib_the_report_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_report(make_metrics(), tmp_path)
    assert "matplotlib is not installed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "plots").exists()


def test_no_folder_of_the_machine_is_shown():
    shown_config = without_folders({"a": "/x/y", "b": ["n=/x/z", "n=o/p"], "c": 3, "d": "org/name"})
    assert shown_config == {"a": "y", "b": ["n=z", "n=o/p"], "c": 3, "d": "org/name"}
