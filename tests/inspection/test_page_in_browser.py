"""The page in a headless Chromium: what people see, point at and press."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from semtoken_hf.inspection.details import REASONS
from semtoken_hf.inspection.page import prompt_page, token_pieces
from semtoken_hf.inspection.planning import plan_ratios
from semtoken_hf.inspection.summary import summarise
from tests.fixtures.text import PROSE

RATIOS = (1.5, 2.4, 4.0, 8.0)
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> שלום\u2028日本\t"
)
TEXT = PROSE + HOSTILE + "\n\n" + "unbroken" * 60 + "\n" + PROSE
# The contrast of text and ground of the first element that a selector finds, by WCAG 2; grounds are opaque here.
CONTRAST = """(selector) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const pair = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.fixture(scope="module")
def plans(planner, tokenizer):
    return plan_ratios(planner, tokenizer(TEXT, return_tensors="pt"), RATIOS)


@pytest.fixture(scope="module")
def page(plans, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(prompt_page(plans, tokenizer, title="A <page>", shown=1), encoding="utf-8")
    return path


def facts(tab, selector):
    """Terms and descriptions of a list."""
    terms, values = (
        tab.run(f"[...document.querySelectorAll('{selector} {name}')].map((e) => e.textContent)")
        for name in ("dt", "dd")
    )
    return dict(zip(terms, values, strict=True))


def slide(tab, place):
    tab.run("document.querySelector('input').focus()")
    tab.press("Home")
    for _ in range(place):
        tab.press("ArrowRight")


def assert_alone(tab, page):
    """Nothing was logged, raised, or asked for."""
    assert tab.messages == []
    assert tab.requests == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_it_fits_and_can_be_read(tab, page, width, scheme):
    tab.open(page, width, scheme=scheme)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("document.title") == "A <page>"
    for place in range(len(RATIOS)):
        slide(tab, place)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    # The darkest shade that there can be, and every other kind of text.
    tab.run("document.querySelector('.text .merged').style = '--h:1'")
    tab.point(".text .merged")
    kinds = (
        ".text .merged",
        ".legend .kept, .kept",
        ".guarded",
        ".facts dt",
        ".caption",
        "output",
        ".tip dt",
        ".tip b",
    )
    for selector in (*kinds, ".tip .chips small", ".ticks span", "th", "td"):
        assert tab.run(f"({CONTRAST})({json.dumps(selector)})") >= 4.5, selector
    assert_alone(tab, page)


def test_the_text_is_the_prompt_and_nothing_of_it_runs(tab, page, plans, tokenizer):
    tab.open(page)
    shown = tab.run("[...document.querySelectorAll('.part')].map((part) => part.textContent).join('')")
    assert shown == "".join(token_pieces(tokenizer, plans[0].input_ids[0].tolist()))
    assert HOSTILE in shown
    assert tab.run("document.title") == "A <page>"
    assert tab.run("document.querySelectorAll('main img, main script').length") == 2


def test_the_slider_changes_the_plan(tab, page, plans):
    tab.open(page)
    assert tab.run("document.querySelector('output').textContent") == "2.4"
    for place, plan in enumerate(plans):
        slide(tab, place)
        wanted = summarise(plan)
        assert tab.run("document.querySelector('output').textContent") == f"{RATIOS[place]:g}"
        assert tab.run("document.querySelectorAll('.text .slot').length") == wanted.slots
        assert tab.run("document.querySelectorAll('.text .merged').length") == sum(
            number for length, number in wanted.lengths.items() if length > 1
        )
        found = facts(tab, ".facts")
        assert found["tokens"] == f"{wanted.tokens:,}"
        assert found["slots"] == f"{wanted.slots:,}"
        assert found["tokens per slot"] == f"{wanted.ratio:.2f}"
        assert found["tokens merged"] == f"{100 * wanted.merged_tokens / wanted.tokens:.1f} %"
        assert found["kept fine"] == f"{100 * wanted.fine_tokens / wanted.tokens:.1f} %"
        assert found["protected or read"] == f"{100 * wanted.protected_tokens / wanted.tokens:.1f} %"
        assert found["longest slot"] == f"{wanted.longest} tokens"
        assert found["budget"].startswith(f"{wanted.budget:,} slots, {'met' if wanted.budget_met else 'not met'}")
        rows = tab.run("[...document.querySelectorAll('tr')].map((row) => [...row.cells].map((c) => c.textContent))")
        assert {int(length): int(number.replace(",", "")) for length, number in rows if number != "0"} == wanted.lengths
    assert_alone(tab, page)


@pytest.mark.parametrize("place", [1, 3])
def test_tooltips_hold_the_plan(tab, page, plans, tokenizer, place):
    tab.open(page)
    slide(tab, place)
    plan = plans[place]
    spans, reasons = plan.span_ids[0], [list(REASONS)[code] for code in plan.reason[0].tolist()]
    pieces = token_pieces(tokenizer, plan.input_ids[0].tolist())
    seen = set()
    merged = (spans.bincount() > 1).nonzero().flatten().tolist()
    for slot in sorted({0, *merged[:3], *merged[-3:], *range(0, int(spans[-1]), 29), int(spans[-1])}):
        first, *_, last = (spans == slot).nonzero().flatten().tolist() * 2
        tab.point(f"[data-s='{slot}']")
        assert tab.run("document.querySelector('.on').dataset.s") == str(slot)
        found = facts(tab, ".tip")
        assert tab.run("document.querySelector('.tip b').textContent") == REASONS[reasons[first]]
        assert found["slot"] == f"{slot:,} of {int(spans[-1]) + 1:,}"
        holds = f"token {first:,}" if first == last else f"{last - first + 1} tokens, {first:,} to {last:,}"
        assert found["holds"] == holds
        assert found["position"] == f"{int(plan.position[0, first]):,}"
        assert float(found["entropy"]) == pytest.approx(float(plan.entropy[0, first]), abs=6e-4)
        chips = tab.run(
            "[...document.querySelectorAll('.chips span')].map((c) => [...c.children].map((e) => e.textContent))"
        )
        assert len(chips) == last - first + 1
        for token, (shown, similarity) in enumerate(chips, start=first):
            assert shown == (pieces[token].replace("\n", "↵").replace("\t", "⇥") or "part of a character")
            assert float(similarity) == pytest.approx(float(plan.similarity[0, token]), abs=6e-3)
        if last > first:
            carrier = first + int(plan.is_carrier[0, first : last + 1].nonzero())
            assert found["read as"] == (pieces[carrier].replace("\n", "↵") or "part of a character")
        candidate = (plan.candidate_ids[0] == plan.candidate_ids[0, first]).nonzero().flatten().tolist()
        if (candidate[0], candidate[-1]) != (first, last):
            assert found["from span"] == f"{len(candidate)} tokens, {candidate[0]:,} to {candidate[-1]:,}"
        else:
            assert "from span" not in found
        seen.add(reasons[first])
    assert {"merged", "special", "read"} <= seen
    assert_alone(tab, page)


def test_keys_walk_from_slot_to_slot(tab, page):
    tab.open(page, height=700)
    tab.run("document.querySelector('.text').focus()")
    last = tab.run("document.querySelectorAll('.text .slot').length") - 1
    for key, slot in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", last)):
        tab.press(key)
        assert tab.run("document.querySelector('.on').dataset.s") == str(slot), key
    assert tab.run(
        "(r => r.top >= 0 && r.bottom <= innerHeight)(document.querySelector('.on').getBoundingClientRect())"
    )
    assert tab.run("document.querySelector('.tip').hidden") is False
    tab.press("Escape")
    assert tab.run("document.querySelector('.tip').hidden") is True
    assert tab.run("document.querySelector('.on')") is None


def test_a_tap_opens_and_the_plot_leads_to_the_text(tab, page, plans):
    tab.open(page, 375, 700)
    tab.point(".text .merged", click=True)
    edges = "(r => [r.left, r.right, r.top])(document.querySelector('.tip').getBoundingClientRect())"
    left, right, _ = tab.run(edges)
    assert left >= 0
    assert right <= 375
    tab.point("svg", click=True)
    # In the middle of the plot stands the middle of the prompt.
    spans = plans[1].span_ids[0]
    assert abs(int(tab.run("document.querySelector('.on').dataset.s")) - int(spans[len(spans) // 2])) <= 1
    assert tab.run(
        "(r => r.top >= 0 && r.bottom <= innerHeight)(document.querySelector('.on').getBoundingClientRect())"
    )


def test_in_a_notebook_it_keeps_to_itself(tab, page, tmp_path):
    """Twice in one document, as notebooks put it there: as markup, with its scripts made anew."""
    host = tmp_path / "host.html"
    host.write_text(
        "<!DOCTYPE html><title>host</title><style>body { margin: 7px; color: rgb(1, 2, 3); }</style>"
        "<h1>host</h1><table><tr><td>cell</td></tr></table><div id='out'></div><div id='again'></div>"
    )
    tab.open(host)
    before = tab.run("getComputedStyle(document.querySelector('td')).cssText + getComputedStyle(document.body).cssText")
    names = tab.run("Object.keys(window).length")
    # A JSON string is a JavaScript one; the closing tags of scripts do no harm, since no parser of HTML reads it.
    source = json.dumps(page.read_text(encoding="utf-8"))
    tab.run(
        "(html => { for (const id of ['out', 'again']) { const out = document.getElementById(id); out.innerHTML = html;"
        "for (const old of out.querySelectorAll('script')) { const made = document.createElement('script');"
        "made.type = old.type; made.textContent = old.textContent; old.replaceWith(made); } } })(" + source + ")"
    )
    counts = tab.run("[...document.querySelectorAll('main')].map((m) => m.querySelectorAll('.text .slot').length)")
    assert len(counts) == 2
    assert counts[0] == counts[1] > 0
    assert tab.run("document.querySelectorAll('main [id]').length") == 0
    after = tab.run("getComputedStyle(document.querySelector('td')).cssText + getComputedStyle(document.body).cssText")
    assert re.sub(r"[\d.]+px", "", after) == re.sub(r"[\d.]+px", "", before)
    assert tab.run("getComputedStyle(document.body).margin") == "7px"
    assert tab.run("document.title") == "host"
    assert tab.run("Object.keys(window).length") == names
    # A notebook has the policy of its own server.
    assert [text for text in tab.messages if "The policy has been ignored" not in text] == []


def test_on_paper_the_text_is_whole(tab, page):
    tab.open(page, 800)
    tab.point(".text .merged")
    tab.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.run("getComputedStyle(document.querySelector('.tip')).display") == "none"
        assert tab.run("getComputedStyle(document.querySelector('.bar')).position") == "static"
    finally:
        tab.send("Emulation.setEmulatedMedia", media="")


def test_one_plan_has_no_slider(tab, plans, tokenizer, tmp_path):
    path = tmp_path / "one.html"
    path.write_text(prompt_page(plans[1:2], tokenizer), encoding="utf-8")
    tab.open(path)
    assert tab.run("getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert tab.run("document.querySelectorAll('.text .slot').length") == summarise(plans[1]).slots
    assert_alone(tab, path)


def test_without_an_encoder(tab, planner, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(planner.config, "segmentation_mode", "uniform")
    monkeypatch.setattr(planner.config, "merge_mode", "mean")  # a learned merger would read fingerprints
    path = tmp_path / "uniform.html"
    uniform = plan_ratios(planner, tokenizer(TEXT, return_tensors="pt"), [2.0, 4.0])
    path.write_text(prompt_page(uniform, tokenizer), encoding="utf-8")
    tab.open(path)
    tab.point(".text .merged")
    assert "entropy" not in facts(tab, ".tip")
    assert tab.run("document.querySelector('.caption').textContent").startswith("No encoder ran.")
    assert tab.run("document.querySelectorAll('.chips small').length") == 0
    assert_alone(tab, path)


def test_where_no_span_has_an_entropy(tab, plans, tokenizer, tmp_path):
    path = tmp_path / "zero.html"
    path.write_text(prompt_page([replace(plans[1], entropy=plans[1].entropy * 0)], tokenizer), encoding="utf-8")
    tab.open(path)
    assert tab.run("document.querySelector('.caption').textContent").startswith("It is 0 everywhere.")
    assert_alone(tab, path)
