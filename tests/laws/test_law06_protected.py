"""Law 6: what is protected keeps a slot of its own: special ids, both ends of a row, and what the caller marks."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.tiny import LLAMA, ragged_prompts, random_ids, tiny_model

from .cases import RATIO, Case, build, each_cell, model_of, outcome_of
from .code_paths import CODE_PATHS

NUM_SINK_TOKENS, RECENT_WINDOW = 2, 4
DECODING = [
    name
    for name, code_path in CODE_PATHS.items()
    if code_path.compresses and code_path.is_decoding and name != "pipeline"
]
# Code paths that take what is given for the prompt: masks of a chat cover one turn or all of it.
MARKED = [name for name in DECODING if name not in ("chat",)]


def sizes_of_tokens(slot_lengths):
    """int64 [T]: how many tokens share each token's slot, for one row of slot lengths [M]."""
    return slot_lengths.repeat_interleave(slot_lengths)


def assert_whole_where_it_must(slot_lengths, ids, marked=None):
    """Of one prompt int64 [n], by the first slots of its row; the rest does merge."""
    sizes = sizes_of_tokens(slot_lengths)[: len(ids)]
    special = torch.isin(ids, torch.tensor([LLAMA[f"{name}_token_id"] for name in ("pad", "bos", "eos")]))
    assert special[1:-RECENT_WINDOW].any() or len(ids) < 16 or marked is not None
    must = special if marked is None else special | marked
    must[:NUM_SINK_TOKENS] = must[-RECENT_WINDOW:] = True
    assert (sizes[must] == 1).all()
    if len(ids) >= 16:
        assert (sizes > 1).any()


@each_cell([name for name in DECODING if not CODE_PATHS[name].is_drafting])
def test_special_ids_and_both_ends(case, code_path):
    cache, rows = outcome_of(case, code_path).cache, CODE_PATHS[code_path].rows()
    copies = len(cache.slot_lengths) // len(rows)
    for number, lengths in enumerate(cache.slot_lengths):
        assert_whole_where_it_must(lengths, rows[number // copies])


@each_cell(MARKED)
def test_what_the_caller_marks(case, code_path):
    """The mask reaches every code path."""
    rows = CODE_PATHS[code_path].rows()
    ids, mask = CODE_PATHS[code_path].batch()
    marked = torch.arange(ids.shape[1]).expand_as(ids) % 7 == 3
    cache = CODE_PATHS[code_path].run(model_of(case), ids, mask, protected_mask=marked & (mask != 0)).cache
    copies = len(cache.slot_lengths) // len(rows)
    for number, lengths in enumerate(cache.slot_lengths):
        row = rows[number // copies]
        assert_whole_where_it_must(lengths, row, marked[0, -len(row) :])


@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
def test_ids_of_the_configuration(segmentation):
    ids = random_ids(1, 96)
    chosen = ids[0, 20:60:9].tolist()
    model = build(Case("llama"), protected_token_ids=chosen, segmentation_mode=segmentation)
    prompt = model.compress(ids, target_ratio=RATIO)
    sizes = sizes_of_tokens(prompt.slot_lengths[0])
    assert (sizes[torch.isin(ids[0], torch.tensor(chosen))] == 1).all()
    assert (sizes > 1).any()


@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
def test_what_stays_whole(segmentation):
    model = tiny_model(segmentation_mode=segmentation)
    ids, mask = ragged_prompts((96, 80))
    ids[0, 30], ids[1, 60] = LLAMA["eos_token_id"], LLAMA["bos_token_id"]
    protected = torch.zeros_like(ids)
    protected[:, 50:70:6] = 1
    prompt = model.compress(ids, mask, protected_mask=protected)
    alone = torch.stack([(row[:, None] == row).sum(1) == 1 for row in prompt.span_ids])
    assert alone[0, 30]
    assert alone[1, 60]
    assert alone[protected.bool()].all()
    for row, first in enumerate((0, 16)):
        assert alone[row, first : first + model.config.num_sink_tokens].all()
        assert alone[row, -model.config.recent_window :].all()
    assert not alone[:, 70:90].all()


def test_what_stays_whole_around_a_read_position():
    """`recent_window` counts before it; `num_sink_tokens` counts from the start of the row alone."""
    model, ids = tiny_model(num_sink_tokens=6, recent_window=3, segmentation_mode="uniform"), random_ids(1, 96)
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[0, 50] = True
    spans = model.compress(ids, read_mask=read).span_ids[0]
    alone = [i for i in range(96) if (spans == spans[i]).sum() == 1]
    assert alone == [*range(6), 48, 49, 50, 51, 93, 94, 95]
