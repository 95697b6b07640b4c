"""The sentence mode against loops over sentences and tokens, and what it is for: what is asked for stays whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from semtoken_hf.sentence_selection import (
    LONGEST_SENTENCE,
    carried_over_cuts,
    exact_match,
    find_sentences,
    first_tokens,
    rank_tokens,
    selected_starts,
    sentence_relevance,
    word_match,
)
from tests.fixtures.tiny import random_ids, tiny_model
from tests.test_granularity import segments_of

END = 5


def some_text(lengths, seed=0):
    """Ids, fingerprints and layout of segments whose sentences end with the id `END` now and then."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (sum(lengths),), generator=generator)
    fingerprints = F.normalize(torch.randn(len(ids), 8, generator=generator) + 0.5, dim=-1)
    return ids, fingerprints, segments_of(lengths)


def sentences_of(ids, layout):
    """Lists of tokens, by a loop."""
    found = []
    for start, length in zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True):
        current = []
        for i in range(start, start + length):
            after_end = current and int(ids[current[-1]]) == END and int(ids[i]) != END
            if after_end or len(current) == LONGEST_SENTENCE:
                found.append(current)
                current = []
            current.append(i)
        found.append(current)
    return found


@pytest.mark.parametrize("lengths", [[120], [1], [49, 3, 200]])
def test_sentences_end_with_their_marks_their_segment_or_the_cap(lengths):
    ids, _, layout = some_text(lengths)
    ids[10:13] = END
    found = find_sentences(ids == END, layout)
    wanted = [n for n, tokens in enumerate(sentences_of(ids, layout)) for _ in tokens]
    assert found.tolist() == wanted


def test_relevance_is_rarity_of_what_is_shared_plus_likeness_each_standardised():
    ids, fingerprints, layout = some_text([160, 90])
    query = torch.zeros(250, dtype=torch.bool)
    query[150:160] = True  # the second segment asks nothing
    query[145:150] = ids[145:150] == END
    ids[149] = END
    sentence = find_sentences(ids == END, layout)
    found = sentence_relevance(ids, fingerprints, sentence, layout, query)
    parts = [s for s in sentences_of(ids, layout) if s[-1] < 160]
    others = [s for s in parts if not query[s[0]]]
    # Tokens and pairs of tokens.
    words = [{int(ids[i]), (int(ids[i - 1]), int(ids[i])) if i else None} for i in range(160)]
    asked = set().union(*(words[i] for i in range(160) if query[i]))
    held = [set().union(*(words[i] for i in s if not query[i])) for s in parts]
    rarity = {t: math.log(len(others) / max(1, sum(t in h for h in held))) for t in asked}
    match = torch.tensor([sum(max(rarity[t], 0) for t in asked & h) for h in held])
    question = F.normalize(fingerprints[query].sum(0), dim=0)
    alike = torch.stack([F.normalize(fingerprints[s].mean(0), dim=0) @ question for s in parts])
    is_other = torch.tensor([s in others for s in parts])

    def standardised(values):
        known = values[is_other]
        return (values - known.mean()) / known.std(correction=0)

    wanted = standardised(match) + standardised(alike)
    torch.testing.assert_close(found[[s[0] for s in parts]], wanted.float(), rtol=1e-3, atol=1e-3)
    assert not found[160:].any()


def test_pairs_find_a_key_of_frequent_tokens():
    """Every sentence has the tokens of the key, one has them in its order."""
    ids = torch.tensor([7, 8, 9, END, 9, 8, 7, END, 8, 7, 9, END, 7, 8, 9, END])
    layout, query = segments_of([16]), torch.arange(16) >= 12
    sentence = find_sentences(ids == END, layout)
    match = word_match(ids, sentence, layout, query, first_tokens(sentence) & ~query)
    assert match[0] > match[4]
    assert match[0] > match[8]


def test_what_is_cut_at_the_cap_goes_on():
    """A part is at least as relevant as the full one before it in its segment."""
    cap = LONGEST_SENTENCE
    lengths = [3 * cap, cap, 9]
    layout, ends = segments_of(lengths), torch.zeros(sum(lengths), dtype=torch.bool)
    sentence = find_sentences(ends, layout)
    relevance = torch.tensor([0.0, 2.0, -1.0, 3.0, 1.0])[sentence]
    found = carried_over_cuts(relevance, sentence, layout)
    assert [float(found[sentence == part].unique()) for part in range(5)] == [0, 2, 2, 3, 1]


def test_a_rare_shared_token_matches_and_a_frequent_one_does_not():
    ids = torch.tensor([9, 20, END, 9, 21, END, 9, 22, END, 9, 21, END])
    layout = segments_of([12])
    query = torch.tensor([False] * 9 + [True] * 3)
    sentence = find_sentences(ids == END, layout)
    counted = torch.tensor([True, False, False] * 3 + [False] * 3)
    match = exact_match(ids, sentence, layout, query, counted)
    assert match[[0, 3, 6]].tolist() == pytest.approx([0, math.log(3), 0], abs=1e-5)


@pytest.mark.parametrize("ratio", [1.5, 2.4, 5.0, 20.0])
def test_slots_begin_around_the_tokens_of_highest_rank_until_the_budget_is_spent(ratio):
    lengths = [120, 7, 300]
    ids, _, layout = some_text(lengths)
    forced = torch.zeros(427, dtype=torch.bool)
    forced[layout.starts] = True
    forced[40:44] = True
    relevance = find_sentences(ids == END, layout).double() % 5
    budget = torch.tensor([math.ceil(n / ratio) for n in lengths])
    starts = selected_starts(rank_tokens(relevance, layout), forced, layout, budget)
    assert starts[forced].all()
    for number, (start, length) in enumerate(zip(layout.starts.tolist(), lengths, strict=True)):
        part = slice(start, start + length)
        assert starts[part].sum() == max(int(budget[number]), int(forced[part].sum()))
        order = sorted(range(start, start + length), key=lambda i: (-float(relevance[i]), -i))
        # By a loop: a token more is whole as long as that needs no more slots than there are.
        wanted, kept = set(forced[part].nonzero().flatten().add(start).tolist()), set()
        for token in order:
            more = {token, token + 1} & set(range(start, start + length))
            if len(wanted | more) > int(budget[number]):
                break
            wanted |= more
            kept.add(token)
        assert all(starts[i] and (i + 1 == start + length or starts[i + 1]) for i in kept)


def test_the_sentence_that_is_asked_for_stays_whole():
    """The question shares a rare token with one sentence far back; without it, the last sentences stay."""
    fields = {"segmentation_mode": "sentence", "text_markers": {"sentence_ends": [END]}, "max_span_length": 64}
    model = tiny_model(**fields, query_weight=1.0, num_sink_tokens=1, recent_window=1)
    ids = random_ids(1, 240)
    ids[ids == END] = 6
    ids[(ids == 250)] = 251
    ids[0, 19:230:20] = END
    ids[0, 45], ids[0, 235] = 250, 250
    query = torch.zeros_like(ids)
    query[0, 235] = 1
    asked = model.compress(ids, target_ratio=4.0, query_mask=query)
    _, counts = asked.span_ids[0].unique(return_counts=True)
    alone = (counts == 1)[asked.span_ids[0]]
    assert alone[40:60].all()
    assert asked.kept_lengths.tolist() == [60]
    model.config.query_weight = 0.0
    latest = model.compress(ids, target_ratio=4.0, query_mask=query)
    _, counts = latest.span_ids[0].unique(return_counts=True)
    alone = (counts == 1)[latest.span_ids[0]]
    assert not alone[40:60].any()
    assert alone[200:].all()
