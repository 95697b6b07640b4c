import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from semtoken_hf.conversion.planner import planner_on_vocabulary
from semtoken_hf.conversion.vocabulary import transplant_embeddings
from semtoken_hf.semantic_encoder import native_dtype
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_tokenizer


def test_the_real_encoder_plans_on_another_vocabulary(minilm):
    tokenizer = tiny_tokenizer()
    planner = planner_on_vocabulary(tokenizer, minilm, encoder_dtype="float32", target_ratio=3.0, min_prompt_length=8)
    assert planner.config.encoder_config.hidden_size == AutoConfig.from_pretrained(minilm).hidden_size
    table = planner.encoder.encoder.get_input_embeddings().weight
    assert table.shape == (len(tokenizer), 384)
    assert not table.requires_grad
    original = AutoModel.from_pretrained(minilm).get_input_embeddings().weight
    moved = transplant_embeddings(tokenizer, AutoTokenizer.from_pretrained(minilm), original)
    torch.testing.assert_close(table, moved)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    plan = planner.plan(ids)
    budget = -(-ids.shape[1] // 3)
    # The last span that would not fit whole stays merged.
    assert budget - planner.config.max_span_length < int(plan.kept_lengths) <= budget
    assert plan.fingerprints is not None
    assert plan.fingerprints.isfinite().all()


def test_a_cheaper_encoder(minilm):
    planner = planner_on_vocabulary(tiny_tokenizer(), minilm, encoder_layers=2)
    assert planner.config.encoder_config.num_hidden_layers == len(planner.encoder.encoder.encoder.layer) == 2
    assert {p.dtype for p in planner.encoder.parameters()} == {native_dtype(torch.device("cpu"))}
