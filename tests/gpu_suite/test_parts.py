"""The parts on a processor, where SDPA stands in for the kernels of a device."""

import time

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from semtoken_hf.attention_semtoken import VARLEN
from semtoken_hf.benchmarking.models import plain_twin
from semtoken_hf.benchmarking.shapes import SHAPES
from semtoken_hf.benchmarking.ways import PADDED, Way
from semtoken_hf.gpu_suite import benchmark, equivalence, gpu_tests, million_tokens, products
from semtoken_hf.gpu_suite.equivalence import Backend, available_backends, compare_backends, compare_plans
from semtoken_hf.gpu_suite.machine import describe_machine
from semtoken_hf.gpu_suite.measuring import measure_way
from semtoken_hf.gpu_suite.models import build_model, prompts
from semtoken_hf.gpu_suite.parts import Context, TimeUp, attention, time_limit
from semtoken_hf.gpu_suite.products import fast_attention, multiply_gains, record_product
from semtoken_hf.semantic_encoder import SemanticEncoder

CUDA, NAME = torch.device("cuda"), "broken_by_hand"


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


def test_machine(context):
    describe_machine(context)
    facts = {row["fact"] for row in context.rows}
    assert {"torch", "flash-attn", "torch.nn.attention.varlen"} <= facts
    assert "No GPU" in context.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_backend_passes_every_case(context, dtype, broken):
    compare_backends(context, dtype, [Backend("sdpa", "sdpa"), broken(of_sdpa())])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_backend_fails(context, dtype, changes, broken):
    compare_backends(context, dtype, [broken(of_sdpa(**changes))])
    failing = {row["case"] for row in context.rows if not row["max abs error"] <= row["tolerance"]}
    assert "ragged batch" in failing
    assert list(context.checks.values()).count(False) == len(failing)


@pytest.mark.parametrize(
    ("error", "checks"),
    [
        (RuntimeError("No available kernel. Aborting execution."), 0),
        (RuntimeError("FlashAttention only support fp16 and bf16 data type"), 0),
        (ValueError("must be contiguous"), 1),
    ],
    ids=["not supported", "half precision only", "fails"],
)
def test_a_backend_that_raises(context, monkeypatch, error, checks, broken):
    def attend(*_, **__):
        raise error

    monkeypatch.setattr(equivalence, "CASES", equivalence.CASES[:1])
    compare_backends(context, torch.float32, [broken(attend), Backend("sdpa", "sdpa")])
    first, second = context.rows
    assert first["max abs error"] is None
    assert first["remark"]
    assert second["max abs error"] is not None
    assert list(context.checks.values()) == [False] * checks + [True]


def test_plans(context, monkeypatch):
    monkeypatch.setattr(equivalence, "PLANS", {"boundary": equivalence.PLANS["boundary"]})
    compare_plans(context, "static")
    assert list(context.checks.values()) == [True] * 3

    monkeypatch.setattr(SemanticEncoder, "_apply", torch.nn.Module._apply)  # it follows the model's dtype
    compare_plans(context, "transformer")
    assert not all(context.checks.values())


def test_backends_degrade_step_by_step(monkeypatch):
    monkeypatch.setattr(million_tokens, "has_torch_varlen", lambda: False)
    for there, expected in ((False, "sdpa flash"), (True, "flash_attention_2")):
        for module in (equivalence, products, million_tokens):
            monkeypatch.setattr(module, "has_flash_attention", lambda there=there: there)
        names = [backend.name for backend in available_backends(CUDA)]
        assert names[:4] == ["sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn"]
        assert names[4:] == [*["flash_attention_2"] * there, VARLEN]
        assert fast_attention(CUDA).name == expected
        assert fast_attention(torch.device("cpu")).name == "sdpa flash"
        assert million_tokens.streaming_attention(CUDA) == (VARLEN if there else "sdpa")
    monkeypatch.setattr(million_tokens, "has_flash_attention", lambda: False)
    monkeypatch.setattr(million_tokens, "has_torch_varlen", lambda: True)
    assert million_tokens.streaming_attention(CUDA) == VARLEN
    assert million_tokens.streaming_attention(torch.device("cpu")) == "sdpa"


def test_products(context):
    multiply_gains(context)
    ways = {(row["attention"], row["way"]): row["slots"] for row in context.rows if "attention" in row}
    plain, ours = ("plain, n tokens", 256), ("SemToken", 107)
    assert ways == {(name, way): slots for name in ("sdpa math", "sdpa flash") for way, slots in (plain, ours)}
    batched = [(row["batching"], row["way"]) for row in context.rows if "batching" in row]
    assert len(set(batched)) == len(batched) == 4
    products = [row for row in context.rows if "product" in row]
    assert len(products) == 3
    assert all(row["both"] / row["product of the two"] == pytest.approx(row["both / product"]) for row in products)


def test_product_of_known_times(context):
    times = {("math", "plain"): 12.0, ("flash", "plain"): 6.0, ("math", "ours"): 4.0, ("flash", "ours"): 3.0}
    record_product(context, "ms", times, ("math", "plain"))
    (row,) = context.rows
    assert (row["flash alone"], row["ours alone"], row["both"], row["product of the two"]) == (2, 3, 4, 6)


def test_benchmark(context):
    benchmark.run_benchmark(context)
    measured = {(row["tokens"], row["way"]): row for row in context.rows if "way" in row}
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


def test_benchmark_goes_on_behind_a_way_that_does_not_fit(context, monkeypatch):
    measure = benchmark.measure_way

    def without_plain(way, *rest):
        if way.name == "plain_n":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return measure(way, *rest)

    monkeypatch.setattr(benchmark, "measure_way", without_plain)
    benchmark.run_benchmark(context)
    assert {row["way"] for row in context.rows if "way" in row} == {"plain, m tokens", "SemToken"}
    assert sum("out of memory" in note for note in context.notes) == len(context.lengths)
    ratios = [row for row in context.rows if row.get("figure") == "KV bytes"]
    assert [(row["plain, n tokens / SemToken"], row["plain, m tokens / SemToken"]) for row in ratios] == [(None, 1)]


def test_a_plain_prompt_whose_cache_does_not_fit_is_noted(context, monkeypatch):
    model = build_model(SHAPES["tiny"])
    monkeypatch.setattr(Context, "free_bytes", lambda self: SHAPES["tiny"].slot_bytes(torch.float32) * 300)
    benchmark.measure_length(context, model, plain_twin(model), "tiny", 256)
    assert {row["way"] for row in context.rows if "way" in row} == {"plain, m tokens", "SemToken"}
    assert any("does not fit" in note for note in context.notes)


def test_no_layer_begins_behind_the_deadline():
    model, batch = build_model(SHAPES["tiny"]), prompts((32,))
    ids = batch.input_ids
    with pytest.raises(TimeUp), time_limit(model, time.time() - 1):
        model(ids)
    with pytest.raises(TimeUp):
        measure_way(Way(PADDED, model, batch, "sdpa"), model.model.semantic_encoder, time.time() - 1)
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


def test_gpu_tests_without_pytest(context, monkeypatch):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    gpu_tests.run_gpu_tests(context)
    assert context.notes == ["Skipped: pytest is not installed."]
    assert not context.checks
