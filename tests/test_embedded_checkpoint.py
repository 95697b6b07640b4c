"""The checkpoint that ships with the repository: real weights on real text."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import semtoken_hf
from scripts.quickstart import QUESTIONS
from semtoken_hf.tokenization_semtoken_fast import special_token_ids
from tests.fixtures.children import ROOT, run_script
from tests.fixtures.tiny import left_padded, plain_twin

FOLDER = ROOT / "model_cards" / "semtoken-llama-tiny"
CHAPTER = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def chapter(tokenizer):
    return tokenizer(CHAPTER, return_tensors="pt")["input_ids"]


def loss_of_the_end(model, ids, scored=256, **call):
    labels = ids.clone()
    labels[:, :-scored] = -100
    with torch.no_grad():
        return float(model(ids, labels=labels, **call).loss)


def test_it_is_small_and_ships_the_current_code():
    files = [f for f in FOLDER.iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16e6
    modules = {f.name for f in files if f.suffix == ".py"}
    source = Path(semtoken_hf.__file__).parent
    assert {"modeling_semtoken_llama.py", "tokenization_semtoken_fast.py"} <= modules
    for name in modules:
        assert (FOLDER / name).read_bytes() == (source / name).read_bytes(), f"{name} is stale: convert again"


def test_it_has_learned_and_compression_costs_little(model, chapter):
    full = loss_of_the_end(model, chapter, compression=False)
    merged = loss_of_the_end(model, chapter, target_ratio=2.4)
    assert full < 4.6  # a uniform guess is ln 8192 = 9.0
    assert full != merged
    assert merged < full + 0.5


def test_it_is_a_plain_llama_when_off(model, chapter):
    plain = plain_twin(model)
    with torch.no_grad():
        assert torch.equal(model(chapter).logits, plain(chapter).logits)


@pytest.mark.parametrize("mode", ["boundary", "greedy", "uniform"])
@pytest.mark.parametrize("ratio", [1.5, 2.4, 4.0])
def test_the_ratio_is_honoured_on_real_text(model, chapter, mode, ratio, monkeypatch):
    monkeypatch.setattr(model.config, "segmentation_mode", mode)
    prompt = model.compress(chapter, target_ratio=ratio)
    assert prompt.budget_met.all()
    budget = math.ceil(chapter.shape[1] / ratio)
    assert 0.97 * budget <= int(prompt.kept_lengths) <= budget


def test_rows_are_independent_on_real_text(model, tokenizer):
    paragraphs = [p for p in CHAPTER.split("\n") if p]
    texts = ["\n".join(paragraphs[:n]) for n in (40, 25, 60, 12)]
    rows = [tokenizer(t, return_tensors="pt")["input_ids"][0] for t in texts]
    ids, mask = left_padded(rows)
    ids = ids.masked_fill(mask == 0, tokenizer.pad_token_id)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row[None], max_new_tokens=12, do_sample=False)
        assert out[ids.shape[1] :].tolist()[: alone.shape[1] - len(row)] == alone[0, len(row) :].tolist()


def test_the_tokenizer_plans_as_the_model_does(model, tokenizer, chapter):
    encoding = tokenizer(CHAPTER, return_tensors="pt", return_span_ids=True, target_ratio=3.0)
    assert torch.equal(encoding["span_ids"], model.compress(chapter, target_ratio=3.0).span_ids)
    assert set(special_token_ids(tokenizer)) <= set(model.config.protected_token_ids)


def test_pipeline_by_path():
    pipe = pipeline("text-generation", model=str(FOLDER), dtype=torch.float32)
    compressed = pipe(CHAPTER, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert compressed.startswith(CHAPTER)
    tail = pipe(CHAPTER, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert compressed == CHAPTER + tail


def test_quickstart_runs():
    options = ["--checkpoint", FOLDER, "--repetitions", "1", "--max-new-tokens", "4"]
    output = run_script("quickstart.py", *options).stdout
    tokens, slots = re.search(r"positions read \(slots\) \| ([\d,]+) \| ([\d,]+) \|", output).groups()
    assert int(slots.replace(",", "")) == math.ceil(int(tokens.replace(",", "")) / 2.4)
    for question in QUESTIONS:
        assert question in output
    assert output.count("  plain:") == output.count("  SemToken:") == len(QUESTIONS)
