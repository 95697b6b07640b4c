"""The parts on a processor, where SDPA stands in for the kernels of a device."""

import time

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from semtoken_hf.benchmarking.shapes import SHAPES
from semtoken_hf.benchmarking.variants import PADDED, Variant
from semtoken_hf.gpu_suite import benchmark, equivalence, gpu_tests
from semtoken_hf.gpu_suite.equivalence import Backend, compare_backends, compare_plans
from semtoken_hf.gpu_suite.measuring import measure_variant
from semtoken_hf.gpu_suite.models import build_model, prompts
from semtoken_hf.gpu_suite.parts import TimeUp, attention, time_limit
from semtoken_hf.semantic_encoder import SemanticEncoder

NAME = "broken_by_hand"


@pytest.fixture
def broken(monkeypatch):
    """A function that registers an attention for this test."""

    def register(function):
        AttentionInterface.register(NAME, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        return Backend(NAME, NAME)

    yield register
    AttentionInterface._global_mapping.pop(NAME, None)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)


def of_sdpa(**changes):
    """SDPA with other arguments than it was given."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        mask = changes.get("attention_mask", lambda mask: mask)(attention_mask)
        value = changes.get("value", lambda value: value)(value)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    return attend


def test_a_right_backend_passes_every_case(context, broken):
    compare_backends(context, torch.float32, [Backend("sdpa", "sdpa"), broken(of_sdpa())])
    assert len(context.checks) == 2 * len(equivalence.CASES)
    assert all(context.checks.values())
    assert all(row["max abs error"] <= row["tolerance"] for row in context.rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": lambda mask: None if mask is None else torch.ones_like(mask)},
        {"value": lambda value: value.roll(1, 2)},
        {"value": lambda value: value * torch.nan},
    ],
    ids=["sees padding and the future", "values of another token", "not a number"],
)
def test_a_wrong_backend_fails(context, changes, broken):
    compare_backends(context, torch.float32, [broken(of_sdpa(**changes))])
    failing = {row["case"] for row in context.rows if not row["max abs error"] <= row["tolerance"]}
    assert "ragged batch" in failing
    assert list(context.checks.values()).count(False) == len(failing)


def test_plans(context, monkeypatch):
    monkeypatch.setattr(equivalence, "PLANS", {"boundary": equivalence.PLANS["boundary"]})
    compare_plans(context, "static")
    assert list(context.checks.values()) == [True] * 3

    monkeypatch.setattr(SemanticEncoder, "_apply", torch.nn.Module._apply)  # it follows the model's dtype
    compare_plans(context, "transformer")
    assert not all(context.checks.values())


def test_benchmark(context):
    benchmark.run_benchmark(context)
    measured = {(row["tokens"], row["variant"]): row for row in context.rows if "variant" in row}
    for length in context.lengths:
        ours = measured[length, "SemToken"]
        at_m = measured[-(-length * 10 // 24), "plain, m tokens"]
        assert at_m["slots"] == at_m["tokens"] == ours["slots"]
        assert at_m["encoder ms"] == 0
        assert ours["KV bytes"] == at_m["KV bytes"]
        assert measured[length, "plain, n tokens"]["KV bytes"] == SHAPES["tiny"].slot_bytes(torch.float32) * length
        assert ours["encoder ms"] > 0
        assert all(ours[name] > 0 for name in ("prefill ms", "decode ms", "generate+64 ms"))
    assert any(row.get("figure") == "KV bytes" and row["plain, n tokens / SemToken"] > 2.3 for row in context.rows)


def test_no_layer_begins_behind_the_deadline():
    model, batch = build_model(SHAPES["tiny"]), prompts((32,))
    ids = batch.input_ids
    with pytest.raises(TimeUp), time_limit(model, time.time() - 1):
        model(ids)
    with pytest.raises(TimeUp):
        measure_variant(Variant(PADDED, model, batch, "sdpa"), model.model.semantic_encoder, time.time() - 1)
    assert model(ids).logits.isfinite().all()
    with attention(model, "eager"):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_gpu_tests_in_a_process_of_their_own(context, tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n@pytest.mark.gpu\ndef test_bad(): assert 0\n"
        "def test_other(): pass\n@pytest.mark.gpu\n@pytest.mark.skip(reason='needs two')\ndef test_skipped(): pass\n"
    )
    gpu_tests.run_gpu_tests(context, str(tmp_path))
    assert context.checks == {"pytest -m gpu": False}
    assert sorted(row["outcome"] for row in context.rows) == ["failed", "passed", "skipped"]
    assert any("needs two" in row["test"] for row in context.rows)
