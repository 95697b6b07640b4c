"""Why a plan is as it is, against loops over tokens that know nothing of the vectorised code."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.granularity import solve_threshold
from semtoken_hf.inspection.details import REASONS, describe
from semtoken_hf.sentence_selection import LONGEST_SENTENCE
from semtoken_hf.span_clustering import shifted_similarities
from tests.fixtures.children import ROOT
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model

FOLDER = ROOT / "model_cards" / "semtoken-llama-tiny"
MODES: dict[str, dict[str, Any]] = {
    "sentence": {},
    "mean": {"merge_mode": "mean"},
    "solved": {"segmentation_mode": "greedy", "max_span_length": 16},
    "capped tau": {"segmentation_mode": "greedy", "similarity_threshold": 0.6, "max_span_length": 5},
    "thresholds": {
        "segmentation_mode": "greedy",
        "target_ratio": None,
        "similarity_threshold": 0.7,
        "entropy_threshold": 0.12,
        "max_span_length": 16,
    },
    "boundary": {"segmentation_mode": "boundary"},
    "uniform": {"segmentation_mode": "uniform"},
    "given": {},
    "short": {"min_prompt_length": 4096},
    "compact": {"position_mode": "compact"},
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    return AutoTokenizer.from_pretrained(FOLDER)(PROSE, return_tensors="pt")["input_ids"]


def names(details: Any, row: int = 0) -> list[str]:
    return [list(REASONS)[code] for code in details.reason[row].tolist()]


def walk(fingerprints: Tensor, unmergeable: list[bool], tau: Tensor | float, cap: int) -> list[int]:
    """First tokens of the greedy spans of one segment, token by token (Algorithm 1)."""
    first, found = 0, [0]
    for token in range(1, len(unmergeable)):
        joins = not unmergeable[token] and not unmergeable[token - 1] and token - first < cap
        if not (joins and float(fingerprints[first] @ fingerprints[token]) > tau):
            first = token
            found.append(token)
    return found


def candidates_of(case: str, config: Any, plan: Any, unmergeable: list[bool], slots: list[int]) -> list[int]:
    """First tokens of the candidate spans."""
    cap, prints = config.max_span_length, plan.fingerprints
    if case in ("boundary", "uniform", "given"):
        return [token for token in range(len(slots)) if token == 0 or slots[token] != slots[token - 1]]
    if case in ("solved", "capped tau"):
        similarities = shifted_similarities(prints, cap - 1)
        highest = 1.0 if case == "solved" else config.similarity_threshold
        return solve_threshold(similarities, plan.layout, plan.budgets, highest).nonzero().flatten().tolist()
    if case == "thresholds":
        return walk(prints, unmergeable, config.similarity_threshold, cap)
    ends, ids = set(config.text_markers["sentence_ends"]), plan.ids
    firsts = [0]
    for token in range(1, len(ids)):
        if (ids[token - 1] in ends and ids[token] not in ends) or token - firsts[-1] == LONGEST_SENTENCE:
            firsts.append(token)
    return firsts


@pytest.mark.parametrize("case", MODES)
def test_equal_to_loops_on_real_weights(model, ids, monkeypatch, case):
    config, count = model.config, ids.shape[1]
    fields = {"min_prompt_length": 64, "recent_window": 24, "merge_mode": "representative", **MODES[case]}
    for name, value in fields.items():
        monkeypatch.setattr(config, name, value)
    question, marked = torch.zeros_like(ids), torch.zeros_like(ids)
    question[0, 200:206], marked[0, 90:93] = 1, 1
    call: dict[str, Any] = {"query_mask": question, "protected_mask": marked}
    if case == "given":
        call["span_ids"] = torch.arange(count)[None] // 3
    prompt = model.compress(ids, **call)
    details = describe(prompt.origin)
    plan = SpanPlanner.from_model(model).plan(ids, **call)
    plan.ids, slots = ids[0].tolist(), prompt.span_ids[0].tolist()
    special = {*config.protected_token_ids, config.bos_token_id, config.eos_token_id, config.pad_token_id}

    protected = {}
    for token in range(count):
        rules = {
            "read": token == count - 1,
            "special": int(ids[0, token]) in special,
            "question": 200 <= token < 206,
            "marked": 90 <= token < 93,
            "short": case == "short",
            "first": token < config.num_sink_tokens,
            "last": count - 1 - token < config.recent_window,
        }
        if why := next((name for name, holds in rules.items() if holds), None):
            protected[token] = why
    firsts = candidates_of(case, config, plan, [t in protected for t in range(count)], slots)
    ends = dict(zip(firsts, [*firsts[1:], count], strict=True))
    expected = []
    for first, end in ends.items():
        if plan.fingerprints is not None:
            span = plan.fingerprints[first:end]
            spread = float(torch.cov(span.T, correction=0).diagonal().sum()) if end - first > 1 else 0.0
            torch.testing.assert_close(
                details.entropy[0, first:end], torch.full((end - first,), spread), atol=2e-6, rtol=0
            )
            cosines = torch.stack([span[0] @ other for other in span])
            cosines[0] = 1
            torch.testing.assert_close(details.similarity[0, first:end], cosines, atol=2e-6, rtol=0)
        assert len(set(details.candidate_ids[0, first:end].tolist())) == 1
        for token in range(first, end):
            free = "merged" if slots.count(slots[token]) > 1 else "budget" if end - first > 1 else "alone"
            expected.append(protected.get(token, free))
    assert len(set(details.candidate_ids[0].tolist())) == len(firsts)
    assert names(details) == expected
    assert set(expected) >= ({"short", "read"} if case == "short" else {"merged", *protected.values()})
    if plan.fingerprints is None:
        assert details.entropy.isnan().all()
        assert details.similarity.isnan().all()
    assert torch.equal(
        details.protected_mask[0], torch.tensor([w not in ("merged", "budget", "alone", "read") for w in expected])
    )
    assert details.read_mask.nonzero().tolist() == [[0, count - 1]]


@pytest.mark.parametrize("fields", [{}, {"merge_mode": "mean"}, {"position_mode": "compact"}], ids=str)
def test_positions_are_those_of_the_slots(fields):
    model = tiny_model(**{"merge_mode": "representative", **fields})
    ids, mask = ragged_prompts((96, 70, 41))
    prompt = model.compress(ids, mask)
    details, width = describe(prompt.origin), prompt.inputs_embeds.shape[1]
    embeddings = model.get_input_embeddings()(ids)
    for row in range(3):
        column = width - int(prompt.kept_lengths[row])
        for token in mask[row].nonzero().flatten().tolist():
            slot = column + int(prompt.span_ids[row, token])
            assert details.position[row, token] == prompt.position_ids[row, slot]
            if details.is_carrier[row, token] and details.merge_mode == "representative":
                assert torch.equal(prompt.inputs_embeds[row, slot], embeddings[row, token])
        assert details.is_carrier[row].sum() == prompt.kept_lengths[row]
    if not fields:
        place = mask.cumsum(1) - 1
        assert torch.equal(details.position[details.is_carrier], place[details.is_carrier])


@pytest.mark.parametrize("segmentation", ["greedy", "sentence", "boundary", "uniform"])
def test_rows_as_if_alone_and_nothing_at_padding(segmentation):
    model = tiny_model(segmentation_mode=segmentation, similarity_threshold=0.3)
    ids, mask = ragged_prompts((96, 70, 41, 9))
    together = describe(model.compress(ids, mask).origin)
    for row, length in enumerate((96, 70, 41, 9)):
        alone = describe(model.compress(ids[row : row + 1, -length:]).origin)
        for name in ("span_ids", "reason", "position", "is_carrier", "entropy", "similarity"):
            ours, theirs = getattr(together, name)[row, -length:], getattr(alone, name)[0]
            torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)
        of_candidates = together.candidate_ids[row, -length:]
        assert torch.equal(of_candidates - of_candidates[0], alone.candidate_ids[0])
        assert together.budget[row] == alone.budget[0]
        padding = together.reason[row, :-length]
        assert (padding == 0).all()
        assert together.entropy[row, :-length].isnan().all()
        assert together.similarity[row, :-length].isnan().all()
        assert (together.span_ids[row, :-length] == -1).all()
        assert (together.candidate_ids[row, :-length] == -1).all()
    assert not together.read_mask[mask == 0].any()
    assert not together.protected_mask[mask == 0].any()


def test_what_is_read_in_the_middle_and_scored_behind_it():
    read = torch.zeros(1, 96, dtype=torch.bool)
    read[0, [40, 95]] = True
    details = describe(tiny_model().compress(random_ids(1, 96), read_mask=read).origin)
    found = names(details)
    # `recent_window` is 4, the position that is read among them.
    assert found[37:42] == ["last", "last", "last", "read", "scored"]
    assert details.read_mask.nonzero().tolist() == [[0, 40], [0, 95]]
    assert details.protected_mask[0, 41]


def test_a_later_turn_protects_no_first_tokens():
    model, ids = tiny_model(), random_ids(1, 96)
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1, compression=True).past_key_values
    found = names(describe(model.compress(random_ids(1, 96, seed=1)[:, 1:], past_key_values=cache).origin))
    assert "first" not in found
    assert "merged" in found
    model.config.min_prompt_length, short = 0, random_ids(1, 3)
    assert names(describe(model.compress(short, past_key_values=cache).origin)) == ["special", "last", "read"]
    assert names(describe(model.compress(short).origin)) == ["special", "first", "read"]


def test_the_models_own_forward_lets_go_of_what_it_planned():
    model = tiny_model()
    with patch("semtoken_hf.modeling_semtoken.log_prefill") as log, torch.no_grad():
        model.generate(random_ids(1, 96), max_new_tokens=4)
    assert [call.args[0].origin for call in log.call_args_list] == [None]


def test_a_configuration_that_changes_later():
    model = tiny_model()
    prompt = model.compress(random_ids(1, 96))
    model.config.target_ratio, model.config.min_prompt_length = 4.0, 4096
    details = describe(prompt.origin)
    assert details.target_ratio == 2.4
    assert "short" not in names(details)


def test_nothing_of_the_encoders_width_is_kept():
    ids = random_ids(2, 96)
    details = describe(tiny_model(segmentation_mode="greedy").compress(ids).origin)
    sizes = [value.untyped_storage().nbytes() for value in vars(details).values() if isinstance(value, Tensor)]
    assert max(sizes) <= ids.numel() * 8


def test_a_prompt_says_in_short_what_it_is():
    assert repr(tiny_model().compress(*ragged_prompts((96, 70)))) == (
        "CompressedPrompt(tokens=[96, 70], slots=[40, 30], budget_met=[True, True])"
    )
