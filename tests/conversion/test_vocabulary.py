from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModel, AutoTokenizer

from semtoken_hf.conversion.text_markers import text_markers
from semtoken_hf.conversion.vocabulary import (
    frequency_order,
    rare_token_ids,
    token_texts,
    transplant_embeddings,
)
from semtoken_hf.tokenization_semtoken_fast import special_token_ids

from .checkpoints import SPECIAL, VOCAB_SIZE, byte_level_tokenizer, metaspace_tokenizer


def ids_of(tokenizer, text: str) -> list[int]:
    """Every id whose text is `text`: an ASCII byte token reads like the character."""
    return [i for i, t in enumerate(token_texts(tokenizer)) if t == text]


def test_texts_of_special_and_undecodable_tokens_are_empty(lm_tokenizer):
    texts = token_texts(lm_tokenizer)
    for token in [*SPECIAL, "<|tool|>"]:
        assert texts[lm_tokenizer.convert_tokens_to_ids(token)] == ""
    lone_byte = "<0xE2>" if "<0xE2>" in lm_tokenizer.get_vocab() else "â"
    assert texts[lm_tokenizer.convert_tokens_to_ids(lone_byte)] == ""
    newline = "<0x0A>" if "<0x0A>" in lm_tokenizer.get_vocab() else "Ċ"
    assert texts[lm_tokenizer.convert_tokens_to_ids(newline)] == "\n"


def test_added_white_space_is_text(lm_tokenizer):
    """Gemma's line breaks are added tokens."""
    lm_tokenizer.add_tokens([AddedToken("\n\n", normalized=False), "<table>"])
    breaks, table = lm_tokenizer.convert_tokens_to_ids(["\n\n", "<table>"])
    assert [token_texts(lm_tokenizer)[i] for i in (breaks, table)] == ["\n\n", ""]
    assert table in special_token_ids(lm_tokenizer)
    assert breaks not in special_token_ids(lm_tokenizer)
    assert breaks in text_markers(lm_tokenizer, len(lm_tokenizer))["line_breaks"]


def test_frequency_order_follows_the_merges_and_not_the_ids():
    tokenizer = metaspace_tokenizer()
    order = frequency_order(tokenizer)
    vocab = tokenizer.get_vocab()
    assert sorted(order) == sorted(set(vocab.values()) - set(special_token_ids(tokenizer)))
    place = {index: n for n, index in enumerate(order)}
    merged = [vocab[t] for t in ("▁t", "▁th", "▁the", "▁c", "▁cats", "▁walking", "Ing")]
    assert [place[i] for i in merged] == sorted(place[i] for i in merged)
    # Single characters have the last ids and are frequent all the same.
    assert vocab["e"] > vocab["Ing"]
    assert place[vocab["e"]] < place[vocab["▁t"]]


def test_rare_ids_are_the_last_merges(lm_tokenizer):
    order = frequency_order(lm_tokenizer)
    assert rare_token_ids(lm_tokenizer, 0.0) == []
    assert rare_token_ids(lm_tokenizer, 1.0) == sorted(order)
    assert rare_token_ids(lm_tokenizer, 3 / len(order) + 1e-9) == sorted(order[-3:])
    with pytest.raises(ValueError, match=r"share.*\[0, 1\]"):
        rare_token_ids(lm_tokenizer, 1.5)


def test_transplant_is_the_mean_of_the_pieces(lm_tokenizer, encoder_folder):
    encoder_tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    weight = torch.randn(len(encoder_tokenizer), 5)
    table = transplant_embeddings(lm_tokenizer, encoder_tokenizer, weight, VOCAB_SIZE)
    assert table.shape == (VOCAB_SIZE, 5)
    assert table.dtype == torch.float32

    def mean(*pieces: str) -> torch.Tensor:
        return weight[encoder_tokenizer.convert_tokens_to_ids(list(pieces))].mean(0)

    for text, pieces in {
        " the": ["the"],
        " cats": ["cat", "##s"],
        " walking": ["walk", "##ing"],
        "ing": ["##ing"],  # lower case without a space: inside a word
        "Ing": ["ing"],  # capital: a new word
        " wal": ["w", "##a", "##l"],
        "s": ["##s"],
        " 7": ["7"],
        "\n": ["[SEP]"],  # white space
        ",": ["[UNK]"],  # not in the encoder's vocabulary
    }.items():
        ids = ids_of(lm_tokenizer, text)
        assert ids, f"{text!r} is no token"
        torch.testing.assert_close(table[ids], mean(*pieces).expand(len(ids), -1), msg=f"{text!r}")
    unknown = mean("[UNK]")
    for index in [*special_token_ids(lm_tokenizer), len(lm_tokenizer), VOCAB_SIZE - 1]:
        torch.testing.assert_close(table[index], unknown)


@torch.no_grad()
def test_minilm_reads_sentences_through_other_ids(minilm):
    """Mean-pooled sentence states stay close to the original pipeline's, and closest to their own sentence."""
    encoder_tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    tokenizer = byte_level_tokenizer()
    sentences = ["the cats walking", "walk the cat the walk", "the 7 cats", "cat cats the cat walking 7 7 7"]
    weight = encoder.get_input_embeddings().weight
    table = transplant_embeddings(tokenizer, encoder_tokenizer, weight, VOCAB_SIZE)
    ours, original = [], []
    for sentence in sentences:
        ids = tokenizer(" " + sentence, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ours.append(encoder(inputs_embeds=table[ids]).last_hidden_state[0].mean(0))
        original.append(encoder(**encoder_tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0))
    cosines = torch.cosine_similarity(torch.stack(ours)[:, None], torch.stack(original)[None], dim=-1)
    assert cosines.diagonal().min() > 0.8
    assert (cosines.argmax(1) == torch.arange(len(sentences))).all()
