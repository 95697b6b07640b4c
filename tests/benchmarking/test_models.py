"""Models, texts and batches are what they are called."""

import pytest
import torch

from semtoken_hf.benchmarking import ways as ways_module
from semtoken_hf.benchmarking.models import build_model, load_planner, plain_twin, text_ids
from semtoken_hf.benchmarking.shapes import SHAPES, ModelShape, shape_of
from semtoken_hf.benchmarking.ways import PADDED, PLAIN_M, PLAIN_N, RAGGED, list_ways
from semtoken_hf.benchmarking.workloads import make_batch
from semtoken_hf.standalone_planner import SpanPlanner
from tests.fixtures import tiny

SMALL = ModelShape(32, 48, 1, 4, 2, vocab_size=400)
# As their authors name them.
PARAMETERS = {"160m": 162.4e6, "1.1b": 1.1e9, "llama-2-7b": 6.74e9, "llama-3-8b": 8.03e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_size_of_their_name(name):
    model = build_model(shape_of(name), "meta")
    count = sum(p.numel() for n, p in model.named_parameters() if "semantic_encoder" not in n)
    assert count == pytest.approx(PARAMETERS[name], rel=0.01)
    assert shape_of(name).weight_bytes(torch.bfloat16) == pytest.approx(2 * count, rel=1e-3)


def test_bytes_of_a_slot():
    # Llama 3 8B: 32 layers, keys and values, 8 heads of 128, two bytes
    assert SHAPES["llama-3-8b"].slot_bytes(torch.bfloat16) == 32 * 2 * 8 * 128 * 2


def test_a_model_has_the_checkpoint_s_fields_and_encoder_on_a_larger_vocabulary(sources):
    planner = load_planner(sources["checkpoint"], max_span_length=5)
    known = SpanPlanner.from_pretrained(sources["checkpoint"])
    model = build_model(SMALL, encoder=planner, positions=1000)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 400
    assert model.config.max_position_embeddings == 1000
    assert (model.config.max_span_length, model.config.keep_last) == (5, known.config.keep_last)
    assert model.config.merge_mode == "learned"
    assert model.config.adapted_for is None
    table = model.model.semantic_encoder.encoder.embeddings.weight
    assert table.dtype == torch.float32
    assert not table.requires_grad
    assert torch.equal(table[: tiny.VOCAB_SIZE], known.encoder.encoder.embeddings.weight)
    assert build_model(SMALL, dtype=torch.float32).dtype == torch.float32


def test_a_smaller_vocabulary_gives_way_to_the_tokenizer_s(sources):
    model = build_model(ModelShape(32, 48, 1, 4, 2, vocab_size=10), encoder=load_planner(sources["checkpoint"]))
    assert model.config.vocab_size == tiny.VOCAB_SIZE


def test_a_random_encoder_and_other_fields(sources):
    planner = load_planner(sources["checkpoint"], tiny.BERT, encoder_window=32)
    model = build_model(SMALL, encoder=planner, max_span_length=5, initializer_range=0.5)
    assert not model.model.semantic_encoder.is_static
    assert model.model.semantic_encoder.width == tiny.BERT["hidden_size"]
    assert (model.config.max_span_length, model.config.merge_mode) == (5, "learned")
    assert model.lm_head.weight.std().item() == pytest.approx(0.5, rel=0.1)
    ids = make_batch("1", text_ids(**sources), 128).input_ids
    # Plans of one encoder are those of the other's weights.
    planner.config.max_span_length = 5
    assert torch.equal(model.compress(ids).span_ids, planner.plan(ids).span_ids)


@pytest.mark.parametrize("kind", ["transformer", "static"])
def test_a_real_encoder(sources, minilm, kind):
    planner = load_planner(sources["checkpoint"], str(minilm), kind)
    model = build_model(SMALL, encoder=planner)
    encoder = model.model.semantic_encoder
    assert encoder.is_static == (kind == "static")
    assert encoder.width == (64 if kind == "static" else 384)
    ids = make_batch("1", text_ids(**sources), 128).input_ids
    # The vocabulary that the encoder was padded to changes no plan.
    assert torch.equal(model.compress(ids).span_ids, planner.plan(ids).span_ids)


def test_the_twin_is_plain_llama_on_the_same_weights(sources):
    model = build_model(SMALL, dtype=torch.float32, encoder=load_planner(sources["checkpoint"]))
    twin, ids = plain_twin(model), text_ids(**sources)[None, :100]
    assert type(twin).__name__ == "LlamaForCausalLM"
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, tiny.plain_twin(model)(ids).logits)
    model.set_attn_implementation("eager")
    assert twin.config._attn_implementation == "sdpa"


def test_batches_are_left_padded_stretches_of_the_text(sources):
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
    monkeypatch.setattr(ways_module, "has_ragged_attention", lambda: registered)
    model = build_model(SMALL, dtype=torch.float32, encoder=load_planner(sources["checkpoint"]))
    batch = make_batch(name, text_ids(**sources), 96)
    ways = {way.name: way for way in list_ways(model, plain_twin(model), batch, 3.0, "sdpa", 32)}
    assert ways.keys() == {PLAIN_N, PLAIN_M, PADDED, *([RAGGED] if registered and name == "4" else [])}
    assert ways[PLAIN_N].batch.lengths == batch.lengths
    assert ways[PLAIN_M].batch.lengths == [32] * len(batch.lengths)
    assert ways[PADDED].inspect()["slots"] == [32] * len(batch.lengths)
    assert ways[PADDED].call == {"target_ratio": 3.0, "prefill_chunk_size": 32}


def test_a_way_sets_its_attention_and_generates_so_many_tokens(sources):
    model = build_model(SMALL, dtype=torch.float32, encoder=load_planner(sources["checkpoint"]))
    batch = make_batch("1", text_ids(**sources), 96)
    eager = ways_module.Way(PADDED, model, batch, "eager")
    assert eager.generate(3).shape == (1, 99)
    assert model.config._attn_implementation == "eager"
    assert ways_module.Way(PADDED, model, batch, "sdpa").measure(4).keys() == {"prefill", "decode", "generate"}
    assert model.config._attn_implementation == "sdpa"
