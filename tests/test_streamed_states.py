"""A prefill in chunks holds the states that are read, and no others."""

from unittest import mock

import pytest
import torch

from semtoken_hf.varlen_semtoken import VARLEN
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model

CHUNK = 7


def states_of(model, ids, **arguments):
    """Logits, and how many columns of states the layers handed on."""
    seen, run = [], model.model._run

    def noting(*args, **kwargs):
        outputs = run(*args, **kwargs)
        seen.append(outputs.last_hidden_state.shape[1])
        return outputs

    with mock.patch.object(model.model, "_run", noting):
        return model(ids, **arguments).logits, seen[-1]


# 13: the first slot that is read, behind 34 others, is the last of a chunk.
@pytest.mark.parametrize("keep", [1, 3, 8, 13, 20])
@pytest.mark.parametrize(("attention", "ragged"), [("sdpa", False), ("sdpa", True), (VARLEN, False)])
@torch.no_grad()
def test_only_the_last_chunks_are_held(keep, attention, ragged):
    model = tiny_model(attn_implementation=attention)
    ids, mask = ragged_prompts() if ragged else (random_ids(1, 96), None)
    arguments = {"attention_mask": mask, "logits_to_keep": keep}
    whole, columns = states_of(model, ids, **arguments)
    chunked, held = states_of(model, ids, prefill_chunk_size=CHUNK, past_key_values=None, **arguments)
    assert keep <= held < keep + CHUNK < columns
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not whole[:, -1].isnan().any()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_behind_a_row_is_no_column_that_is_read(padding_side):
    model = tiny_model()
    ids, mask = ragged_prompts()
    if padding_side == "right":
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    arguments = {"attention_mask": mask, "logits_to_keep": 60}
    whole, _ = states_of(model, ids, **arguments)
    chunked, _ = states_of(model, ids, prefill_chunk_size=CHUNK, **arguments)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_is_read_anywhere_keeps_all_states():
    model = tiny_model()
    ids = random_ids(1, 96)
    labels = torch.full_like(ids, -100)
    labels[:, 20] = ids[:, 20]
    whole, columns = states_of(model, ids, labels=labels)
    chunked, held = states_of(model, ids, labels=labels, prefill_chunk_size=CHUNK)
    assert held == columns
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    by_index, held = states_of(model, ids, logits_to_keep=torch.tensor([5, 95]), prefill_chunk_size=CHUNK)
    assert held > CHUNK
    assert not by_index.isnan().any()
