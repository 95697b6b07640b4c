"""The page of a plan, as text: what is in it, and what can never get out of it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from semtoken_hf.inspection.details import describe
from semtoken_hf.inspection.page import STEPS, prompt_page, token_pieces
from tests.fixtures.children import run_clean, run_python
from tests.fixtures.pages import data_of, flags_of, numbers_of
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model, tiny_tokenizer

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \" ' & \\ \u2028\u2029 שלום 日本\n\t\0"
CHILD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = model.compress(**tokenizer(text, return_tensors="pt"))
assert type(prompt).__module__.startswith("transformers_modules.")
try:
    page = prompt.to_html(tokenizer)
except ImportError as error:
    page = str(error)
print("FACTS" + json.dumps(page))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes them: spaces as ▁, and a token for each byte."""
    pieces = ["<s>", "\u2581the", "\u2581cat", "s", "\u2581"]
    vocabulary = {piece: place for place, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def page_of(text: str, tokenizer: Any, **fields: Any) -> tuple[str, Any]:
    prompt = tiny_model(**fields).compress(tokenizer(text, return_tensors="pt")["input_ids"])
    return prompt.to_html(tokenizer), prompt


def test_pieces_are_the_text(tokenizer):
    ids = tokenizer(HOSTILE)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]) == HOSTILE
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_pieces_of_byte_fallback_tokens():
    tokenizer = byte_fallback_tokenizer()
    vocabulary = tokenizer.get_vocab()
    of_bytes = (f"<0x{byte:02X}>" for byte in "日\U0001f600".encode())
    names = ["<s>", "\u2581the", "\u2581cat", "s", "\u2581", *of_bytes, "\u2581the"]
    pieces = token_pieces(tokenizer, [vocabulary[name] for name in names])
    assert pieces == ["<s>", " the", " cat", "s", " ", "", "", "日", "", "", "", "\U0001f600", " the"]


@pytest.mark.parametrize(
    "text", ["a\ufffdb\ufffd\ufffd\ufffd\ufffdc", "\ufffd" * 9, "\ufffd日本\ufffdé", "日" * 99, "\ufffd" * 99]
)
def test_replacement_characters_that_are_in_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert (len(pieces), "".join(pieces[1:])) == (len(ids), text)
    assert max(map(len, pieces)) < 30  # none waits for the end of the text


def test_a_text_that_ends_within_a_character(tokenizer):
    ids = tokenizer("the 日", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(token_pieces(tokenizer, ids)) == "the \ufffd"
    assert token_pieces(tokenizer, []) == []


@pytest.mark.parametrize("segmentation", ["greedy", "sentence", "boundary", "uniform"])
def test_the_page_holds_the_plan(tokenizer, segmentation):
    text = "the cat sat on the mat and the dog ran to the man " * 8
    page, prompt = page_of(text, tokenizer, segmentation_mode=segmentation, merge_mode="representative")
    data, details = data_of(page), describe(prompt.origin)
    count = details.input_ids.shape[1]
    assert "".join(data["pieces"][1:]) == text
    (plan,), pool = data["plans"], data["pool"]
    assert (plan["ratio"], plan["budget"], plan["mode"]) == (2.4, int(prompt.budgets[0]), "representative")
    for name, ids in {"slots": details.span_ids, "candidates": details.candidate_ids}.items():
        assert np.array_equal(flags_of(pool[plan[name]], count).cumsum() - 1, ids[0]), name
    assert np.array_equal(flags_of(pool[plan["carriers"]], count), details.is_carrier[0])
    assert np.array_equal(numbers_of(pool[plan["positions"]], "<i4"), prompt.position_ids[0])
    assert np.array_equal(numbers_of(pool[plan["reason"]], "i1"), details.reason[0])
    for name in ("entropy", "similarity"):
        if segmentation == "uniform":
            assert plan[name] is None
        else:
            values = numbers_of(pool[plan[name]], "<i2") / STEPS
            np.testing.assert_allclose(values, getattr(details, name)[0], atol=1 / STEPS)
    assert list(data["reasons"])[int(details.reason[0, 0])] == "special"


def test_hostile_text_stays_data(tokenizer):
    page, _ = page_of(HOSTILE * 3, tokenizer)
    assert "".join(data_of(page)["pieces"][1:]) == HOSTILE * 3
    assert "alert(" not in page.replace("\\u003cscript\\u003ealert(1)", "").replace("onerror=alert(2)", "")
    assert page.lower().count("<script") == page.lower().count("</script") == 2
    assert not re.search("<(img|iframe|link|object|embed|base)", page)
    inside = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert page.encode()


def test_half_a_character_of_another_tokenizer_can_be_written(tokenizer):
    class Halves:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "\ud83d" * len(ids)

    prompt = tiny_model().compress(random_ids(1, 32))
    page = prompt.to_html(Halves())
    assert page.encode()
    assert data_of(page)["pieces"] == ["\ud83d"] * 32


def test_the_title_is_escaped(tokenizer):
    plans = [describe(tiny_model().compress(random_ids(1, 32)).origin)]
    page = prompt_page(plans, tokenizer, title='<b>&"@DATA@ @SCRIPT@')
    assert "<title>&lt;b&gt;&amp;&quot;@DATA@ @SCRIPT@</title>" in page


def test_the_page_allows_its_own_script_alone(tokenizer):
    page, _ = page_of("the cat", tokenizer)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', page)[1]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(
        r"\b(src|href|action)\s*=|@import|url\(|innerHTML|fetch\(|https?:(?!//www.w3.org/2000/svg)", page
    )


def test_what_plans_share_is_written_once(tokenizer):
    model, ids = tiny_model(segmentation_mode="sentence"), random_ids(1, 400)
    ratios = (1.5, 2.0, 3.0, 4.0)
    plans = [describe(model.compress(ids, target_ratio=r).origin) for r in ratios]
    data = data_of(prompt_page(plans, tokenizer, shown=2))
    assert [plan["ratio"] for plan in data["plans"]] == list(ratios)
    assert data["shown"] == 2
    for name in ("entropy", "similarity", "candidates"):
        assert len({plan[name] for plan in data["plans"]}) == 1, name
    assert len({plan["slots"] for plan in data["plans"]}) == 4
    assert len(data["pool"]) == len(set(data["pool"]))


def test_a_long_document_stays_small(tokenizer):
    model, ids = tiny_model(), random_ids(1, 10_000)
    plans = [describe(model.compress(ids, target_ratio=r).origin) for r in (1.5, 2.0, 2.4, 3.0, 4.0, 6.0, 8.0)]
    # Boundary mode, in which every ratio has candidates of its own.
    assert len(prompt_page(plans, tokenizer).encode()) < 1e6


def test_one_row_of_a_batch(tokenizer):
    model = tiny_model()
    prompt = model.compress(*ragged_prompts((96, 41)))
    alone = model.compress(random_ids(1, 41, seed=1))
    ours, theirs = data_of(prompt.to_html(tokenizer, row=1)), data_of(alone.to_html(tokenizer))
    assert ours == theirs
    assert len(data_of(prompt.to_html(tokenizer, row=0))["pieces"]) == 96
    for row, message in ((None, "pass `row`, 0 to 1"), (2, "must be in 0 to 1, got 2"), (-1, "got -1")):
        with pytest.raises(ValueError, match=message):
            prompt.to_html(tokenizer, row=row)


def test_what_cannot_be_shown(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="what this prompt was made from"):
        replace(model.compress(random_ids(1, 32)), origin=None).to_html(tokenizer)
    plans = [describe(model.compress(random_ids(1, 32, seed=seed)).origin) for seed in (0, 1)]
    with pytest.raises(ValueError, match="same ids"):
        prompt_page(plans, tokenizer)


def test_thresholds_alone_have_no_ratio(tokenizer):
    fields = {"segmentation_mode": "greedy", "target_ratio": None, "similarity_threshold": 0.3}
    page, prompt = page_of("the cat sat on the mat " * 9, tokenizer, **fields)
    (plan,) = data_of(page)["plans"]
    assert plan["ratio"] is None
    assert plan["budget"] == prompt.original_lengths[0]


@pytest.mark.slow
def test_a_prompt_of_the_checkpoints_own_code(tmp_path, tokenizer, monkeypatch):
    """The package draws it, and where the package is missing the error says what to install."""
    model, text = tiny_model(segmentation_mode="greedy"), "the cat sat on the mat and the dog ran to the man " * 6
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = model.compress(**tokenizer(text, return_tensors="pt")).to_html(tokenizer)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert run_python(CHILD, tmp_path / "model", text) == expected
    assert "pip install semtoken-hf" in run_clean(CHILD, tmp_path / "model", text, home=tmp_path / "clean")
