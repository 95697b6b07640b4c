"""A static encoder from a transformer encoder: one small vector per token of the language model.

- Model2Vec (MinishLab, 2024, github.com/MinishLab/model2vec): every token's text goes through the encoder by itself
  and PCA shortens its mean-pooled last hidden state. No training.
- SIF (Arora et al., 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"): weight a / (a + p), so that
  frequent words do not drown the rest in a mean over neighbours. p follows Zipf's law over the rank of frequency.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .vocabulary import frequency_order, token_texts

# The `a` of SIF, as in Model2Vec.
SIF_COEFFICIENT = 1e-4
TEXTS_PER_BATCH = 256


def distill_static_encoder(
    lm_tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    encoder_tokenizer: PreTrainedTokenizerBase,
    dim: int = 64,
    vocab_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """One vector per token, whose running mean over neighbours behaves like a contextual state.

    Args:
        lm_tokenizer: fast tokenizer of the language model.
        encoder: the transformer encoder, on its own vocabulary.
        encoder_tokenizer: its tokenizer.
        dim: length of the vectors.
        vocab_size: rows of the result. None: the tokenizer's.
        progress: show a bar over the batches.

    Returns:
        float32 [V, dim], centred over the distinct texts and weighted by rarity; zero for white space, special
        tokens, lone bytes and ids beyond the tokenizer. The same input gives the same table.

    Raises:
        ValueError: `dim` is more than the encoder's hidden size or the number of distinct texts.
    """
    texts = [text.strip() for text in token_texts(lm_tokenizer)]
    distinct = sorted({text for text in texts if text}, key=lambda text: (len(text), text))
    states = encode_texts(distinct, encoder, encoder_tokenizer, progress)
    if not 1 <= dim <= min(states.shape):
        raise ValueError(f"`dim` must be in [1, {min(states.shape)}], got {dim}")
    vectors = principal_components(states, dim)
    row = {text: n for n, text in enumerate(distinct)}
    ids = torch.tensor([i for i, text in enumerate(texts) if text])
    rows = torch.tensor([row[text] for text in texts if text])
    table = torch.zeros(max(len(texts), vocab_size or 0), dim)
    table[ids] = vectors[rows] * rarity_weights(lm_tokenizer, len(texts))[ids, None]
    return table[:vocab_size].contiguous()


@torch.no_grad()
def encode_texts(
    texts: list[str], encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> Tensor:
    """Mean over the last hidden states of each text, float32 [N, D] on the CPU."""
    device = next(encoder.parameters()).device
    was_training, means = encoder.training, []
    encoder.eval()
    for start in tqdm(range(0, len(texts), TEXTS_PER_BATCH), desc="encode tokens", disable=not progress):
        batch = tokenizer(
            texts[start : start + TEXTS_PER_BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"
        ).to(device)
        states = encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        means.append(((states * mask).sum(1) / mask.sum(1)).cpu())
    encoder.train(was_training)
    return torch.cat(means)


def principal_components(states: Tensor, dim: int) -> Tensor:
    """Centred `states` [N, D] on their `dim` leading principal components, float32 [N, dim]."""
    centred = states.double() - states.double().mean(0)
    # Exact and without a seed: D is small. The sign of a component is free; its largest entry is made positive.
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :dim]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return (centred @ (axes * largest.sign())).float()


def rarity_weights(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """SIF weight a / (a + p) in (0, 1] of each id, float32 [size]; p is Zipf's over `frequency_order`, 0 elsewhere."""
    order = torch.tensor(frequency_order(tokenizer))
    frequency = 1 / torch.arange(1, len(order) + 1, dtype=torch.float64)
    weights = torch.ones(size, dtype=torch.float64)
    weights[order] = SIF_COEFFICIENT / (SIF_COEFFICIENT + frequency / frequency.sum())
    return weights.float()


__all__ = ["distill_static_encoder"]
