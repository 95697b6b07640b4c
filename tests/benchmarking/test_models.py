"""Models, texts and batches are what they are called."""

import pytest
import torch

from semtoken_hf.benchmarking import variants as variants_module
from semtoken_hf.benchmarking.models import build_model, load_planner, plain_twin, text_ids
from semtoken_hf.benchmarking.shapes import ModelShape
from semtoken_hf.benchmarking.variants import PADDED, PLAIN_M, PLAIN_N, RAGGED, list_variants
from semtoken_hf.benchmarking.workloads import make_batch
from semtoken_hf.tokenization_semtoken_fast import SpanPlanner
from tests.fixtures import tiny

SMALL = ModelShape(32, 48, 1, 4, 2, vocab_size=400)


def test_a_model_has_the_checkpoint_s_fields_and_encoder_on_a_larger_vocabulary(sources):
    planner = load_planner(sources["checkpoint"], max_span_length=5)
    known = SpanPlanner.from_pretrained(sources["checkpoint"])
    model = build_model(SMALL, encoder=planner, positions=1000)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 400
    assert model.config.max_position_embeddings == 1000
    assert (model.config.max_span_length, model.config.recent_window) == (5, known.config.recent_window)
    assert model.config.merge_mode == "learned"
    assert model.config.adapted_for is None
    table = model.model.semantic_encoder.encoder.embeddings.weight
    assert table.dtype == torch.float32
    assert not table.requires_grad
    assert torch.equal(table[: tiny.VOCAB_SIZE], known.encoder.encoder.embeddings.weight)
    assert build_model(SMALL, dtype=torch.float32).dtype == torch.float32


def test_the_twin_is_plain_llama_on_the_same_weights(sources):
    model = build_model(SMALL, dtype=torch.float32, encoder=load_planner(sources["checkpoint"]))
    twin, ids = plain_twin(model), text_ids(**sources)[None, :100]
    assert type(twin).__name__ == "LlamaForCausalLM"
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, tiny.plain_twin(model)(ids).logits)
    model.set_attn_implementation("eager")
    assert twin.config._attn_implementation == "sdpa"


def test_batches_are_left_padded_segments_of_the_text(sources):
    ids = text_ids(**sources)
    assert ids[0] == 1  # BOS
    batch = make_batch("skewed", ids, 64)
    assert batch.lengths == [64, 8, 8, 8]
    assert torch.equal(batch.attention_mask.sum(1), torch.tensor(batch.lengths))
    assert (batch.attention_mask.diff(dim=1) >= 0).all()
    rows = [row[mask.bool()] for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert torch.equal(rows[0], ids[:64])
    assert all(row[0] == 1 for row in rows)
    assert len({tuple(row[:8].tolist()) for row in rows}) == 4
    # A text that is too short goes on from its start, behind BOS.
    long = make_batch("1", ids, len(ids) + 10).input_ids[0]
    assert torch.equal(long[len(ids) :], ids[1:11])
    short = batch.first_tokens([5, 2, 8, 1])
    assert short.lengths == [5, 2, 8, 1]
    assert torch.equal(short.input_ids[0, 3:], ids[:5])
    assert short.input_ids.shape == (4, 8)


@pytest.mark.parametrize(("name", "registered"), [("1", True), ("4", True), ("4", False)])
def test_ways(sources, monkeypatch, name, registered):
    monkeypatch.setattr(variants_module, "has_ragged_attention", lambda: registered)
    model = build_model(SMALL, dtype=torch.float32, encoder=load_planner(sources["checkpoint"]))
    batch = make_batch(name, text_ids(**sources), 96)
    variants = {variant.name: variant for variant in list_variants(model, plain_twin(model), batch, 3.0, "sdpa", 32)}
    assert variants.keys() == {PLAIN_N, PLAIN_M, PADDED, *([RAGGED] if registered and name == "4" else [])}
    assert variants[PLAIN_N].batch.lengths == batch.lengths
    assert variants[PLAIN_M].batch.lengths == [32] * len(batch.lengths)
    assert variants[PADDED].inspect()["slots"] == [32] * len(batch.lengths)
    call = variants[PADDED].call
    assert (call["target_ratio"], call["prefill_chunk_size"]) == (3.0, 32)
    asked = torch.zeros_like(batch.input_ids)
    asked[:, -12:] = 1  # an eighth of 96
    assert torch.equal(call["query_mask"], asked)
