from __future__ import annotations

import torch
from transformers import AutoModel, AutoTokenizer

from semtoken_hf.conversion.distillation import distill_static_encoder, rarity_weights
from semtoken_hf.conversion.vocabulary import frequency_order, token_texts
from semtoken_hf.tokenization_semtoken_fast import special_token_ids

from .checkpoints import VOCAB_SIZE, word_tokenizer


def load(folder):
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_table_is_deterministic_and_padded(encoder_folder, lm_tokenizer):
    encoder, encoder_tokenizer = load(encoder_folder)
    encoder.train()  # dropout must not matter
    first = distill_static_encoder(lm_tokenizer, encoder, encoder_tokenizer, 8, VOCAB_SIZE)
    assert encoder.training
    torch.manual_seed(123)
    again = distill_static_encoder(lm_tokenizer, *load(encoder_folder), 8, VOCAB_SIZE)
    assert first.shape == (VOCAB_SIZE, 8)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    blank = [i for i, text in enumerate(token_texts(lm_tokenizer)) if not text.strip()]
    assert set(special_token_ids(lm_tokenizer)) < set(blank)
    assert not first[blank].any()
    assert not first[len(lm_tokenizer) :].any()
    assert torch.isfinite(first).all()


def test_rare_tokens_weigh_more(lm_tokenizer):
    weights = rarity_weights(lm_tokenizer, VOCAB_SIZE)
    order = frequency_order(lm_tokenizer)
    assert (weights[order].diff() > 0).all()
    assert weights[order[0]] > 0
    assert (weights[special_token_ids(lm_tokenizer)] == 1).all()


def test_related_words_are_nearer_than_unrelated_ones(minilm):
    groups = [["dog", "cat", "horse"], ["piano", "guitar", "violin"], ["Monday", "Tuesday", "Friday"]]
    words = [word for group in groups for word in group]
    tokenizer = word_tokenizer([*words, "river", "engine", "bread", "the", "of", "law", "red"])
    table = distill_static_encoder(tokenizer, *load(minilm), 8)
    texts = token_texts(tokenizer)
    vectors = torch.nn.functional.normalize(table[[texts.index(" " + word) for word in words]], dim=-1)
    cosines, label = vectors @ vectors.T, torch.arange(9) // 3
    related, itself = label[:, None] == label, torch.eye(9, dtype=torch.bool)
    assert cosines[related & ~itself].mean() > cosines[~related].mean() + 0.3
    nearest = cosines.masked_fill(itself, -2).argmax(1)
    assert (label[nearest] == label).all()
