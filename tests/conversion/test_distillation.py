from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from semtoken_hf.conversion.distillation import distill_static_encoder, principal_components, rarity_weights
from semtoken_hf.conversion.vocabulary import frequency_order, special_token_ids, token_texts

from .checkpoints import VOCAB_SIZE, byte_level_tokenizer, word_tokenizer


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


def test_same_word_with_and_without_space_differs_in_weight_only(encoder_folder):
    tokenizer = byte_level_tokenizer()
    table = distill_static_encoder(tokenizer, *load(encoder_folder), 8)
    texts = token_texts(tokenizer)
    plain, spaced = table[texts.index("7")], table[texts.index(" 7")]
    torch.testing.assert_close(torch.cosine_similarity(plain, spaced, dim=0), torch.tensor(1.0))
    assert spaced.norm() > plain.norm()  # a merge is rarer than a byte


def test_vocabulary_smaller_than_the_tokenizer(encoder_folder):
    tokenizer = byte_level_tokenizer()
    whole = distill_static_encoder(tokenizer, *load(encoder_folder), 8)
    cut = distill_static_encoder(tokenizer, *load(encoder_folder), 8, 100)
    assert torch.equal(cut, whole[:100])


@pytest.mark.parametrize("dim", [0, 25])
def test_impossible_dimension_is_refused(encoder_folder, dim):
    with pytest.raises(ValueError, match=r"`dim` must be in \[1, 24\]"):
        distill_static_encoder(byte_level_tokenizer(), *load(encoder_folder), dim)


def test_principal_components_keep_the_leading_variance():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 3.0, 1.0, 0.1, 0.01])
    states = torch.randn(400, 5, generator=generator) * scales + 7
    reduced = principal_components(states, 2)
    torch.testing.assert_close(reduced.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    _, singular, _ = torch.linalg.svd((states - states.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(reduced.double().norm(dim=0), singular[:2], rtol=1e-4, atol=0)
    # A rotation of the input does not change the cosines.
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    again = principal_components(states @ rotation, 2)
    torch.testing.assert_close(again @ again.T, reduced @ reduced.T, rtol=1e-3, atol=1e-2)


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
