"""Law 8: the cache tells the truth, whatever code path filled it; operations and chats have files of their own."""

from __future__ import annotations

import math

import pytest
import torch

from tests.fixtures.cached_rows import states_of_row

from .cases import CLOSE, RATIO, WINDOW, each_case, each_cell, model_of, outcome_of, spread_cases
from .code_paths import CODE_PATHS, LONG_STEPS, RECOMPRESS_EVERY, generate, second_turn
from .slots import Part, read_parts

CACHED = [
    name
    for name, code_path in CODE_PATHS.items()
    if code_path.compresses and code_path.is_decoding and name != "pipeline"
]
RECENT_WINDOW = 4
# The call that reads generated text again ends with a token that is still to be read.
AGAIN = RECOMPRESS_EVERY + RECENT_WINDOW


def results(case, code_path):
    """(number, prompt int64 [n], its generated tokens) of every row of what a code path came to."""
    outcome, rows = outcome_of(case, code_path), CODE_PATHS[code_path].rows()
    copies = len(outcome.by_row["tokens"]) // len(rows)
    for number, tokens in enumerate(outcome.by_row["tokens"]):
        yield number, rows[number // copies], tokens


@each_cell(CACHED)
def test_books(case, code_path):
    """Lengths in tokens of the original sequence, columns and bytes as somebody else counts them."""
    cache, outcome = outcome_of(case, code_path).cache, outcome_of(case, code_path)
    rows, (ids, _) = CODE_PATHS[code_path].rows(), CODE_PATHS[code_path].batch()
    # The last token of an answer is chosen but not read.
    read = outcome.by_row["tokens"].shape[1] - 1
    turns, width = [0] * len(rows), 0
    if code_path == "chat":
        answer = outcome.by_row["first tokens"].shape[1]
        turns = [answer + len(row) // 2 for row in rows]
        width = max(turns)
    if code_path == "recompressed":
        # Where the text begins that the next reading again would take.
        assert cache.generated.start == ids.shape[1] + RECOMPRESS_EVERY
    copies = len(cache.slot_lengths) // len(rows)
    assert cache.get_seq_length() == ids.shape[1] + width + read
    assert type(cache.get_seq_length()) is int
    original = torch.tensor([len(row) + turn + read for row, turn in zip(rows, turns, strict=True)])
    assert torch.equal(cache.original_lengths, original.repeat_interleave(copies))
    assert torch.equal(cache.compressed_lengths, (cache.slot_lengths > 0).sum(1))
    columns = cache.slot_lengths.shape[1]
    assert cache.physical_length() == (max(cache.compressed_lengths) if case.is_ragged else columns)
    assert cache.get_query_offset() == (0 if case.is_ragged else columns)
    assert cache.is_compressed
    assert torch.equal(cache.compressed_rows, cache.compressed_lengths < cache.original_lengths)
    mask = cache.attention_mask
    assert (cache.slot_lengths > 0).all() if mask is None else torch.equal(mask, (cache.slot_lengths > 0).long())
    counted = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache.memory_bytes() == counted
    if case.is_ragged:
        slots = cache.compressed_lengths.tolist()
        assert cache.ragged_rows.lengths == slots
        room = sum(n + 16 + n // 32 for n in slots)
        assert all(sum(slots) <= t.shape[0] <= room for layer in cache.layers for t in (layer.keys, layer.values))
        return
    for layer in cache.layers:
        held = layer.keys.shape[2]
        is_window = getattr(layer, "is_sliding", False)
        assert WINDOW - 1 <= held <= columns if is_window else held == columns
        assert layer.keys.shape[0] == len(cache.slot_lengths)


def parts_of(code_path, prompt, tokens, first):
    """What was read, and which of its last columns predict which of `tokens`: [(parts, first token, columns)]."""
    opening, count = Part(prompt, RATIO), len(tokens)
    if code_path == "chat":
        turn = second_turn(prompt[None], torch.ones_like(prompt[None]))[0]
        # The last token of the answer is read with the next turn.
        behind = [Part(first[:-1]), Part(torch.cat([first[-1:], turn]), RATIO), Part(tokens[:-1])]
        return [([opening, *behind], 0, count), ([opening, Part(first[:-1])], None, 0)]
    if code_path == "recompressed":
        ratio = AGAIN / (math.ceil(RECOMPRESS_EVERY / RATIO) + RECENT_WINDOW)
        again = [Part(tokens[:AGAIN], ratio), Part(tokens[AGAIN:-1])]
        whole = [opening, Part(tokens[: AGAIN - 1])]
        return [(whole, 0, AGAIN), ([opening, *again], AGAIN, LONG_STEPS - AGAIN)]
    return [([opening, Part(tokens[:-1])], 0, count)]


@each_cell(CACHED, everything=True)
def test_decoding_is_one_pass_over_the_slots(case, code_path):
    """Every step's logits are those of the plain model that reads slots and answer at once, without a cache."""
    outcome = outcome_of(case, code_path)
    chat_padding = case.is_sliding and code_path == "chat"
    for number, prompt, tokens in list(results(case, code_path))[: 1 if chat_padding else None]:
        first = outcome.by_row["first tokens"][number] if code_path == "chat" else None
        for parts, start, count in parts_of(code_path, prompt, tokens, first):
            logits = read_parts(case, parts)[0]
            if start is None:
                expected = outcome.by_row["first logits"][number]
                torch.testing.assert_close(logits[-len(expected) :], expected, **CLOSE)
            elif "logits" in outcome.by_row:
                torch.testing.assert_close(
                    outcome.by_row["logits"][number, start : start + count], logits[-count:], **CLOSE
                )
            else:
                score = logits[-count:].log_softmax(-1).gather(1, tokens[:, None]).mean()
                torch.testing.assert_close(outcome.by_row["sequences_scores"][number], score, **CLOSE)


@each_cell(["by hand", "chunked prefill"], everything=True)
def test_other_ways_to_greedy_text(case, code_path):
    ours, theirs = outcome_of(case, code_path), outcome_of(case, "greedy")
    assert torch.equal(ours.by_row["tokens"], theirs.by_row["tokens"])
    torch.testing.assert_close(ours.by_row["logits"], theirs.by_row["logits"], **CLOSE)
    assert torch.equal(ours.cache.slot_lengths, theirs.cache.slot_lengths)


@each_cell([name for name, code_path in CODE_PATHS.items() if code_path.is_drafting], everything=True)
def test_drafts_change_nothing(case, code_path):
    """Rejected drafts are cropped away: tokens and slots are those of greedy decoding."""
    outcome = outcome_of(case, code_path)
    greedy = generate(model_of(case), *CODE_PATHS[code_path].batch(), steps=outcome.by_row["tokens"].shape[1])
    assert torch.equal(outcome.by_row["tokens"], greedy.by_row["tokens"])
    assert torch.equal(outcome.cache.slot_lengths, greedy.cache.slot_lengths)


@each_cell(["chat", "recompressed", "beams"])
def test_what_is_held_stays_bit_identical(case, code_path):
    """Later turns, reading again and beams leave the keys of the prompt as the first call wrote them."""
    if case.is_sliding:
        pytest.skip("a window forgets")
    cache, first = outcome_of(case, code_path).cache, outcome_of(case, "greedy").cache
    copies = len(cache.slot_lengths) // len(first.slot_lengths)
    for row in range(len(cache.slot_lengths)):
        for ours, theirs in zip(states_of_row(cache, row), states_of_row(first, row // copies), strict=True):
            prompt = theirs.shape[1] - 4
            assert prompt > 0
            assert torch.equal(ours[:, :prompt], theirs[:, :prompt])


@pytest.mark.parametrize("chunk", [1, 16, 1000])
@each_case(spread_cases()[::3])
def test_chunks_of_any_size(case, chunk):
    """Cut behind the plan: what one go gives."""
    theirs = outcome_of(case, "greedy")
    ours = generate(model_of(case), *CODE_PATHS["chunked prefill"].batch(), prefill_chunk_size=chunk)
    assert torch.equal(ours.by_row["tokens"], theirs.by_row["tokens"])
    torch.testing.assert_close(ours.by_row["logits"], theirs.by_row["logits"], **CLOSE)
    assert torch.equal(ours.cache.slot_lengths, theirs.cache.slot_lengths)
