"""Law 3: nothing that is scored, and nothing after it, reaches the plan of what comes before. By perturbation."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures.tiny import BERT, VOCAB_SIZE, random_ids, tiny_model

from .cases import CLOSE, RATIO, each_case, each_cell, every_case, model_of, outcome_of
from .code_paths import CODE_PATHS, labels_of

TOKENS = 160
SETTINGS = {
    "boundary": {},
    "greedy": {"segmentation_mode": "greedy"},
    "uniform": {"segmentation_mode": "uniform"},
    "greedy at a threshold": {
        "segmentation_mode": "greedy",
        "target_ratio": None,
        "similarity_threshold": 0.7,
        "entropy_threshold": 0.2,
    },
    "absolute budget": {"target_ratio": None, "max_slots": 20},
    "representative": {"merge_mode": "representative"},
    "compact": {"position_mode": "compact"},
    # Fingerprints that reach farther than what stays whole before a border, which would hide a leak.
    "wide fingerprints": {"recent_window": 0, "fingerprint_radius": 5},
    "wide fingerprints, greedy": {"recent_window": 0, "fingerprint_radius": 5, "segmentation_mode": "greedy"},
    # Windows longer than most segments.
    "transformer": {"encoder_config": BERT, "encoder_window": 48, "encoder_overlap": 8, "recent_window": 0},
}


@pytest.fixture(params=SETTINGS)
def model(request):
    return tiny_model(**SETTINGS[request.param])


def random_labels(ids, seed):
    """Scored runs of 1 to 6 tokens, far enough apart that segments between them merge."""
    generator = torch.Generator().manual_seed(seed)
    labels, place = torch.full_like(ids, -100), 0
    while True:
        place += int(torch.randint(24, 50, (1,), generator=generator))
        end = place + int(torch.randint(1, 7, (1,), generator=generator))
        if end > ids.shape[1]:
            return labels
        labels[:, place:end] = ids[:, place:end]
        place = end


def other_tokens(ids, where):
    """`ids` with every token in the slice `where` replaced by another ordinary one."""
    changed = ids.clone()
    changed[:, where] = 3 + (ids[:, where] - 3 + 101) % (VOCAB_SIZE - 3)
    assert (changed[:, where] != ids[:, where]).all()
    return changed


def borders(span_ids):
    """bool [B, T - 1]: whether a slot ends between neighbours: the plan without its numbering."""
    return span_ids.diff(dim=1) != 0


def run(model, ids, labels):
    with torch.no_grad():
        return model(ids, labels=torch.where(labels == -100, labels, ids))


def assert_same_until(ours, theirs, end):
    """No plan and no readable logit before position `end` differs."""
    assert torch.equal(ours.span_ids[:, :end], theirs.span_ids[:, :end])
    assert torch.equal(ours.logits[:, :end].isnan(), theirs.logits[:, :end].isnan())
    torch.testing.assert_close(ours.logits[:, :end], theirs.logits[:, :end], atol=2e-5, rtol=1e-5, equal_nan=True)


@each_case(every_case())
def test_scored_text_is_not_seen(case):
    """Other words where labels score, and behind them: plan and readable logits before them stay."""
    model, (ids, mask) = model_of(case), CODE_PATHS["labels"].batch()
    outcome = outcome_of(case, "labels")
    labels = labels_of(ids, mask)
    width = ids.shape[1]
    # The first scored token of either run, and everything from there on.
    for place in (width - 30, width - 5):
        for where in (slice(place, place + 1), slice(place, width)):
            changed = other_tokens(ids, where)
            with torch.no_grad():
                out = model(changed, attention_mask=mask, labels=changed.where(labels != -100, -100))
            assert torch.equal(out.span_ids[:, :place], outcome.others["span_ids"][:, :place])
            torch.testing.assert_close(out.logits[:, :place], outcome.others["raw"][:, :place], **CLOSE, equal_nan=True)


@each_cell(
    [
        name
        for name, code_path in CODE_PATHS.items()
        if code_path.compresses and code_path.is_decoding and name != "pipeline"
    ]
)
def test_what_is_generated_does_not_change_the_slots_of_the_prompt(case, code_path):
    """Drafts, answers, later turns and reading again leave the plan of the prompt as `compress` makes it."""
    ids, mask = CODE_PATHS[code_path].batch()
    prompt = model_of(case).compress(ids, mask, target_ratio=RATIO)
    expected = prompt.slot_lengths.repeat_interleave(len(outcome_of(case, code_path).cache.slot_lengths) // len(ids), 0)
    assert torch.equal(outcome_of(case, code_path).cache.slot_lengths[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_scored_and_later_tokens_change_nothing_before_them(model, seed):
    ids = random_ids(1, TOKENS, seed)
    labels = random_labels(ids, seed)
    outputs = run(model, ids, labels)
    assert outputs.compressed_lengths[0] < TOKENS - 30
    scored = (labels[0] != -100).nonzero()[:, 0].tolist()
    assert len(scored) >= 4
    for place in scored:
        # The logit that predicts the token stands right before it.
        assert outputs.logits[0, place - 1].isfinite().all()
        for where in (slice(place, place + 1), slice(place, TOKENS)):
            assert_same_until(run(model, other_tokens(ids, where), labels), outputs, place)


@pytest.mark.parametrize("seed", [3, 4])
def test_segments_are_planned_alone(model, seed):
    """A token changes the borders of its own segment alone, wherever it stands."""
    ids = random_ids(1, TOKENS, seed)
    labels = random_labels(ids, seed)
    outputs = run(model, ids, labels)
    read = F.pad(labels[:, 1:] != -100, (0, 1))[0]
    ends = [-1, *read.nonzero()[:, 0].tolist(), TOKENS - 1]
    segments = [(a + 1, b + 1) for a, b in itertools.pairwise(ends) if b - a > 20]
    assert len(segments) >= 3
    for start, end in segments:
        # The first token of a segment is scored unless it opens the row, the last one is read: both are borders.
        changed = run(model, other_tokens(ids, slice(start + 1, end)), labels)
        same = torch.ones(TOKENS - 1, dtype=torch.bool)
        same[start:end] = False
        assert torch.equal(borders(changed.span_ids)[0, same], borders(outputs.span_ids)[0, same])


def test_plans_do_follow_their_tokens():
    """The perturbations above do change plans where they may."""
    model = tiny_model()
    ids = random_ids(1, TOKENS)
    labels = random_labels(ids, 0)
    changed = run(model, other_tokens(ids, slice(5, 20)), labels)
    assert not torch.equal(borders(changed.span_ids), borders(run(model, ids, labels).span_ids))


@pytest.mark.parametrize("kept", [1, 7])
def test_kept_logits(model, kept):
    """Tokens behind the first read position are scored by `logits_to_keep` as they are by labels."""
    ids = random_ids(1, TOKENS)
    first = TOKENS - kept
    with torch.no_grad():
        outputs = model(ids, logits_to_keep=kept)
        assert outputs.compressed_lengths[0] < TOKENS - 30
        for place in range(first + 1, TOKENS):
            changed = model(other_tokens(ids, slice(place, TOKENS)), logits_to_keep=kept)
            assert torch.equal(changed.span_ids, outputs.span_ids)
            before = place - first
            torch.testing.assert_close(changed.logits[:, :before], outputs.logits[:, :before], atol=2e-5, rtol=1e-5)


def test_protected_tokens_are_seen_but_stay_whole():
    """They are no border: the budget counts the whole segment, and their neighbours still merge."""
    model = tiny_model()
    ids = random_ids(1, TOKENS)
    protected = torch.zeros_like(ids)
    protected[:, 40:120:10] = 1
    prompt = model.compress(ids, protected_mask=protected)
    assert prompt.budget_met.all()
    assert prompt.kept_lengths[0] == -(-TOKENS * 10 // 24)
    spans = prompt.span_ids[0]
    for place in range(40, 120, 10):
        assert (spans == spans[place]).sum() == 1
