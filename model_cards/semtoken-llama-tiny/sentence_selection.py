"""Spans that follow the text: whole sentences stay fine, those that matter most first, and what lies between merges.

- A sentence ends with a token that ends one (punctuation, line break; found at conversion) or at a cap on its length.
- Its relevance to the question is an exact match, the rarity of every token and every pair of tokens that both have,
  plus a likeness, the cosine of their mean fingerprints; each in standard deviations over the sentences of a segment.
  Names, numbers and keys, which fingerprints blur, match; other words for the same thing are alike.
- What is cut at the cap goes on: the part behind a relevant one is as relevant, since a key has its value there.
- Without a question the latest sentences matter most.
- Tokens are ranked by their sentence, and slots begin around the first of them until the budget is spent, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .span_clustering import row_products
from .token_layout import TokenLayout

LONGEST_SENTENCE = 48
# Rarities are added as integers, whose order of adding does not matter on any device.
FIXED_POINT = 2**20
# Bounds what a part of the stream needs beside its fingerprints.
TOKENS_PER_PART = 16384


def find_sentences(ends: Tensor, layout: TokenLayout) -> Tensor:
    """Sentence of every token, int64 [N], counted over the whole stream; `ends` bool [N] marks tokens that end one.

    Several such tokens in a row end one sentence. None crosses a segment or has more than `LONGEST_SENTENCE` tokens.
    """
    place = torch.arange(len(ends), device=ends.device)
    opens = place == layout.starts[layout.segment]
    opens[1:] |= ends[:-1] & ~ends[1:]
    first = place.where(opens, 0).cummax(0).values
    return (opens | ((place - first) % LONGEST_SENTENCE == 0)).long().cumsum(0) - 1


def rank_tokens(relevance: Tensor, layout: TokenLayout) -> Tensor:
    """Order in which tokens are kept, int64 [N]: by segment, then by falling relevance, the later one first."""
    order = _by_segment(len(relevance) - 1 - relevance.flip(0).argsort(descending=True, stable=True), layout)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def selected_starts(rank: Tensor, forced: Tensor, layout: TokenLayout, budget: Tensor) -> Tensor:
    """Where slots begin so that the tokens of lowest rank have slots of their own: bool [N].

    A token is alone if a slot begins at it and one at the next token, so each of the two is wanted as early as the
    token is. Of every segment, exactly `budget` slots begin, or as many as are `forced`.

    Args:
        rank: int64 [N], from `rank_tokens`.
        forced: bool [N], where a slot begins in any case.
        layout: the segments.
        budget: int64 [S].
    """
    wanted = rank.clone()
    wanted[1:] = wanted[1:].minimum(rank[:-1])
    order = _by_segment(wanted.where(~forced, -1).argsort(stable=True), layout)
    number = torch.arange(len(order), device=order.device) - layout.starts[layout.segment[order]]
    return forced | torch.zeros_like(forced).scatter_(0, order, number < budget[layout.segment[order]])


def _by_segment(order: Tensor, layout: TokenLayout) -> Tensor:
    """`order` int64 [N] of tokens with those of a segment together."""
    return order[layout.segment[order].argsort(stable=True)]


def sentence_relevance(
    input_ids: Tensor, fingerprints: Tensor, sentence: Tensor, layout: TokenLayout, query: Tensor
) -> Tensor:
    """How much a sentence has to do with the question of its segment: float32 [N], the same for all its tokens.

    Args:
        input_ids: int64 [N].
        fingerprints: float32 [N, D] of unit norm.
        sentence: int64 [N], from `find_sentences`.
        layout: the segments.
        query: bool [N], tokens of the question; a segment without any has relevance 0 throughout.
    """
    counted = first_tokens(sentence) & ~query
    match = word_match(input_ids, sentence, layout, query, counted)
    alike = likeness(fingerprints, sentence, layout, query)
    both = standardised(match, counted, layout) + standardised(alike, counted, layout)
    asked = _per_segment(query.float(), layout) > 0
    return carried_over_cuts(both.float().where(asked[layout.segment], 0), sentence, layout)


def word_match(input_ids: Tensor, sentence: Tensor, layout: TokenLayout, query: Tensor, counted: Tensor) -> Tensor:
    """Exact matches of tokens and of pairs of tokens, float64 [N]; arguments as `exact_match`.

    Pairs find keys whose tokens are frequent one by one, as digits are.
    """
    matches = [
        exact_match(ids, sentence, layout, query, counted) for ids in (input_ids, token_pairs(input_ids, layout))
    ]
    return matches[0] + matches[1]


def token_pairs(input_ids: Tensor, layout: TokenLayout) -> Tensor:
    """One number for every token and the one before it, int64 [N]; -1 for the first token of a segment."""
    pairs = torch.full_like(input_ids, -1, dtype=torch.int64)
    pairs[1:] = (input_ids[:-1].long() << 31) + input_ids[1:]
    return pairs.scatter(0, layout.starts, -1)


def carried_over_cuts(relevance: Tensor, sentence: Tensor, layout: TokenLayout) -> Tensor:
    """Relevance, [N], in which what follows `LONGEST_SENTENCE` tokens of a sentence is at least as relevant as they."""
    place, start = torch.arange(len(sentence), device=sentence.device), sentence_starts(sentence)
    goes_on = (place == start) & (place - start.roll(1) == LONGEST_SENTENCE) & (place != layout.starts[layout.segment])
    return relevance.maximum(relevance.roll(1).where(goes_on, -torch.inf))[start]


def first_tokens(sentence: Tensor) -> Tensor:
    """bool [N], the first token of every sentence."""
    first = torch.ones_like(sentence, dtype=torch.bool)
    first[1:] = sentence[1:] != sentence[:-1]
    return first


def sentence_starts(sentence: Tensor) -> Tensor:
    """Place of the first token of every token's sentence, int64 [N]."""
    place = torch.arange(len(sentence), device=sentence.device)
    return place.where(first_tokens(sentence), 0).cummax(0).values


def exact_match(input_ids: Tensor, sentence: Tensor, layout: TokenLayout, query: Tensor, counted: Tensor) -> Tensor:
    """Sum of log(sentences / sentences with it) over the distinct tokens that a sentence shares with the question.

    Args:
        input_ids: int64 [N], or whatever else is matched (`token_pairs`).
        counted: bool [N], the first token of every sentence outside the question.
        sentence, layout, query: as `sentence_relevance`.

    Returns:
        float64 [N]. The question's own tokens match nothing.
    """
    # By segment and token; within, as they stand, so by sentence.
    order = _by_segment(input_ids.argsort(stable=True), layout)
    new_token, new_sentence = torch.ones_like(query), torch.ones_like(query)
    new_token[1:] = input_ids[order].diff().bool() | layout.segment[order].diff().bool()
    new_sentence[1:] = new_token[1:] | sentence[order].diff().bool()
    token = new_token.long().cumsum(0) - 1
    holds = new_sentence & ~query[order]
    zeros = torch.zeros_like(token)
    holders = zeros.index_add(0, token, holds.long())[token]
    is_asked = zeros.index_add(0, token, query[order].long())[token] > 0
    sentences = _per_segment(counted.double(), layout)[layout.segment[order]]
    rarity = (sentences.clamp(min=1) / holders.clamp(min=1)).log().clamp(min=0)
    value = (rarity * FIXED_POINT).round().long().where(holds & is_asked, 0)
    return zeros.index_add(0, sentence[order], value)[sentence].double() / FIXED_POINT


def likeness(fingerprints: Tensor, sentence: Tensor, layout: TokenLayout, query: Tensor) -> Tensor:
    """Cosine of a sentence's mean fingerprint with the mean fingerprint of the question, float64 [N]."""
    question = F.normalize(_question_sums(fingerprints, layout, query), dim=-1)
    products = row_products(fingerprints, question, layout.segment)
    lengths = torch.zeros_like(sentence).index_add_(0, sentence, torch.ones_like(sentence))
    sums = torch.segment_reduce(products.double(), "sum", lengths=lengths, unsafe=True)
    return sums[sentence] / _sentence_norms(fingerprints, sentence).clamp(min=1e-6)


def _question_sums(fingerprints: Tensor, layout: TokenLayout, query: Tensor) -> Tensor:
    """Sum of the question's fingerprints in each segment, [S, D], part by part of the stream."""
    sums = fingerprints.new_zeros((len(layout.lengths), fingerprints.shape[1]))
    ends = layout.starts + layout.lengths
    for start in range(0, len(query), TOKENS_PER_PART):
        part = slice(start, start + TOKENS_PER_PART)
        asked = fingerprints[part] * query[part, None]
        inside = ends.clamp(start, start + len(asked)) - layout.starts.clamp(start, start + len(asked))
        sums += torch.segment_reduce(asked, "sum", lengths=inside, unsafe=True)
    return sums


def _sentence_norms(fingerprints: Tensor, sentence: Tensor) -> Tensor:
    """Norm of the sum of the fingerprints of every token's sentence, [N], part by part of the stream."""
    norms = fingerprints.new_empty(len(sentence))
    for start in range(0, len(sentence), TOKENS_PER_PART):
        # Every sentence that begins in this part ends in it, or a sentence's length later.
        part = slice(start, start + TOKENS_PER_PART + LONGEST_SENTENCE)
        number = sentence[part] - sentence[start]
        lengths = torch.zeros_like(number).index_add_(0, number, torch.ones_like(number))
        sums = torch.segment_reduce(fingerprints[part], "sum", lengths=lengths, unsafe=True)
        own = torch.linalg.vector_norm(sums, dim=-1)[number[:TOKENS_PER_PART]]
        norms[start : start + TOKENS_PER_PART] = own
    return norms[sentence_starts(sentence)]


def standardised(values: Tensor, counted: Tensor, layout: TokenLayout) -> Tensor:
    """`values` [N], alike within a sentence, less their mean and in standard deviations over a segment's sentences."""
    count = _per_segment(counted.double(), layout).clamp(min=1)
    centred = values - (_per_segment(values * counted, layout) / count)[layout.segment]
    deviation = (_per_segment(centred.square() * counted, layout) / count).sqrt()
    return centred / deviation.clamp(min=1e-6)[layout.segment]


def _per_segment(values: Tensor, layout: TokenLayout) -> Tensor:
    """Sum of `values` [N] over each segment, [S]; not by `index_add_`, whose order of adding a GPU does not fix."""
    return torch.segment_reduce(values, "sum", lengths=layout.lengths, unsafe=True)


__all__ = [
    "carried_over_cuts",
    "exact_match",
    "find_sentences",
    "first_tokens",
    "likeness",
    "rank_tokens",
    "selected_starts",
    "sentence_relevance",
    "standardised",
    "token_pairs",
    "word_match",
]
