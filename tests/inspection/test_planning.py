"""One prompt at several ratios, from the encoder alone."""

from __future__ import annotations

import json

import pytest
import torch

from semtoken_hf import SpanPlanner
from semtoken_hf.inspection.details import describe
from semtoken_hf.inspection.planning import plan_ratios
from semtoken_hf.inspection.summary import notes_on, summarise
from tests.fixtures.tiny import BERT, random_ids, tiny_model

FIELDS = {
    "sentence": {"segmentation_mode": "sentence", "merge_mode": "representative"},
    "uniform": {"segmentation_mode": "uniform"},
    "transformer": {"encoder_config": dict(BERT), "encoder_window": 32, "encoder_overlap": 4},
}


@pytest.mark.parametrize("case", FIELDS)
def test_the_plans_are_those_of_the_model(tmp_path, case):
    model, ids = tiny_model(**FIELDS[case]), random_ids(1, 300)
    model.save_pretrained(tmp_path)
    marks = {name: torch.zeros_like(ids) for name in ("protected_mask", "query_mask")}
    marks["protected_mask"][0, 30:33], marks["query_mask"][0, 280:290] = 1, 1
    plans = plan_ratios(SpanPlanner.from_pretrained(tmp_path), {"input_ids": ids, **marks}, [1.5, None, 4.0])
    for ratio, plan in zip([1.5, None, 4.0], plans, strict=True):
        expected = describe(model.compress(ids, target_ratio=ratio, **marks).origin)
        assert vars(plan).keys() == vars(expected).keys()
        for name, value in vars(expected).items():
            ours = getattr(plan, name)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(ours, value, equal_nan=True, msg=name)
            else:
                assert ours == value, name


def test_the_encoder_reads_once(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    planner, calls = SpanPlanner.from_pretrained(tmp_path), []
    planner.encoder.register_forward_hook(lambda *_: calls.append(1))
    plan_ratios(planner, {"input_ids": random_ids(1, 96)})
    assert calls == [1]
    # The hook that counts is gone again.
    assert not planner.encoder.encoder._forward_hooks


def test_the_weights_of_the_language_model_are_not_read(tmp_path):
    """A checkpoint in shards of which only those with the encoder are there."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if "semantic_encoder" in key}
    gone = [path for path in tmp_path.glob("*.safetensors") if path.name not in needed]
    assert len(gone) > 2
    for path in gone:
        path.unlink()
    (plan,) = plan_ratios(SpanPlanner.from_pretrained(tmp_path), {"input_ids": random_ids(1, 96)}, [3.0])
    assert torch.equal(plan.span_ids, model.compress(random_ids(1, 96), target_ratio=3.0).span_ids)


def test_uniform_spans_need_no_encoder(tmp_path):
    model = tiny_model(segmentation_mode="uniform")
    weights = {name: value for name, value in model.state_dict().items() if "semantic_encoder" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    planner = SpanPlanner.from_pretrained(tmp_path)
    assert planner.encoder is None
    (plan,) = plan_ratios(planner, {"input_ids": random_ids(1, 96)}, [2.0])
    assert torch.equal(plan.span_ids, model.compress(random_ids(1, 96), target_ratio=2.0).span_ids)
    with pytest.raises(ValueError, match="no semantic encoder"):
        SpanPlanner.from_pretrained(tmp_path, {"segmentation_mode": "greedy"})


def test_figures_of_a_plan():
    model, ids = tiny_model(), random_ids(1, 96)
    ids[0, 50] = 2  # EOS
    plan = describe(model.compress(ids, target_ratio=3.0).origin)
    found, spans = summarise(plan), plan.span_ids[0].tolist()
    lengths = [spans.count(slot) for slot in range(max(spans) + 1)]
    assert (found.tokens, found.slots, found.longest) == (96, 32, max(lengths))
    assert found.ratio == 3.0
    assert found.lengths == {n: lengths.count(n) for n in sorted(set(lengths))}
    # The first two, the EOS, and the last four, of which one is read.
    assert found.protected_tokens == 7
    assert found.merged_tokens == sum(n for n in lengths if n > 1)
    assert found.merged_tokens + found.fine_tokens + found.protected_tokens == 96
    assert found.reasons == {"merged": found.merged_tokens, "alone": found.fine_tokens, "read": 1} | {
        "special": 2,
        "first": 1,
        "last": 3,
    }
    assert (found.budget, found.budget_met, found.target_ratio) == (32, True, 3.0)


def test_notes_say_what_a_reader_may_wonder_about():
    model = tiny_model(compression=False)
    plan = describe(model.compress(random_ids(1, 96)).origin)
    assert [n.split(" ")[0] for n in notes_on([plan], model.config, False)] == ["compression"]
    model = tiny_model()
    tight = [describe(model.compress(random_ids(1, 96), target_ratio=r).origin) for r in (2.0, 60.0)]
    assert notes_on(tight, model.config, False) == [
        "not met: 60; protected tokens or max_span_length (8) forbid it",
    ]
    assert "does not decide" in notes_on(tight[:1], model.config, True)[0]
    short = describe(model.compress(random_ids(1, 9)).origin)
    assert "9 tokens are fewer than min_prompt_length (16)" in notes_on([short], model.config, False)[0]
    shorter = describe(model.compress(random_ids(1, 2)).origin)
    assert "2 tokens are fewer than min_prompt_length (16)" in notes_on([shorter], model.config, False)[0]
