"""The model `semtoken` of lm-eval: contexts are compressed, and every answer is scored whole."""

import pytest
from transformers import dynamic_module_utils

import semtoken_hf
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import tiny_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from tests.fixtures.lm_eval_tasks import (
    CHOICES,
    CONTEXTS,
    FIELDS,
    LONG,
    SCORED,
    SHORT,
    assert_scores,
    expected,
    generated,
    loaded,
)


@pytest.mark.parametrize(
    ("fields", "batch_size"),
    [({}, 1), ({"position_mode": "compact"}, 3), ({"adapter": True}, 3)],
    ids=str,
)
def test_the_scores_are_those_of_a_call_with_labels(evaluate, plain, caplog, fields, batch_size):
    build = adapted_model if fields.get("adapter") else tiny_model
    model = build(**FIELDS, **{k: v for k, v in fields.items() if k != "adapter"})
    results, answers = evaluate(loaded(model, batch_size=batch_size), SCORED)
    wanted = {name: expected(model, name) for name in SCORED}
    for name in SCORED:
        assert_scores(answers[name], wanted[name])
        for i in LONG:
            assert answers[name][i][0][0] != pytest.approx(plain[name][i][0][0], rel=1e-3)
    # Contexts that several requests share are read once: both tasks have the same ones here. The longest is cut by
    # each continuation to another place.
    seen = {(i, w[2:]) for rows in wanted.values() for i, row in enumerate(rows) for w in row if w[3] < w[2]}
    read = results["config"]["semtoken"]["loglikelihood"]
    assert read["plain"] == len(SHORT) * (len(CHOICES) + 1)
    assert read["compressed"] == len(seen) == len(LONG) - 1 + len({len(c) for c in CHOICES})
    assert (read["tokens"], read["slots"]) == tuple(sum(counts[k] for _, counts in seen) for k in (0, 1))
    assert read["tokens"] > 2 * read["slots"]
    assert f"{len(CHOICES) + 1} requests exceed max_length=512" in caplog.text


def test_rows_in_which_nothing_merges_are_scored_beside_others(evaluate):
    model = tiny_model(**FIELDS, target_ratio=None, max_slots=120)
    results, answers = evaluate(loaded(model, batch_size=3), SCORED)
    for name in SCORED:
        assert_scores(answers[name], expected(model, name))
    assert results["config"]["semtoken"]["loglikelihood"]["compressed"] > 0


def test_arguments_of_the_model_are_fields_of_the_configuration(folders, evaluate):
    arguments = {"target_ratio": 4, "segmentation_mode": "uniform", "recent_window": 2}
    results, answers = evaluate("semtoken", SCORED, pretrained=str(folders / "semtoken"), **arguments)
    model = tiny_model(**FIELDS, **arguments)
    for name in SCORED:
        assert_scores(answers[name], expected(model, name))
    own = results["config"]["semtoken"]
    assert own["target_ratio"] == 4
    assert own["loglikelihood"]["tokens"] / own["loglikelihood"]["slots"] == pytest.approx(4, rel=0.05)


def test_without_compression_it_is_hf(folders, evaluate, plain):
    results, answers = evaluate("semtoken", pretrained=str(folders / "semtoken"), compression=False)
    assert answers == plain
    for request_type in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        read = results["config"]["semtoken"][request_type]
        assert read["compressed"] == read["tokens"] == read["slots"] == 0
        assert read["plain"] >= len(CONTEXTS)


def test_short_contexts_are_read_as_hf_reads_them(folders, evaluate, plain):
    answers = evaluate("semtoken", pretrained=str(folders / "semtoken"))[1]
    for name in (*SCORED, "answers"):
        assert [answers[name][i] for i in SHORT] == [plain[name][i] for i in SHORT]
        assert [answers[name][i] for i in LONG] != [plain[name][i] for i in LONG]


def test_rolling_windows_are_read_as_hf_reads_them_and_say_so(folders, evaluate, caplog):
    fields = {"pretrained": str(folders / "semtoken"), "min_prompt_length": 0}
    reference = {"pretrained": str(folders / "plain")}
    answers = evaluate("semtoken", ["rolling"], 2, **fields)[1]
    assert answers == evaluate("hf", ["rolling"], 2, **reference)[1]
    assert "SemToken compresses nothing in loglikelihood_rolling" in caplog.text
    caplog.clear()
    evaluate("semtoken", ["rolling"], compression=False, **fields)
    assert "SemToken compresses nothing" not in caplog.text


def test_a_model_of_the_code_that_a_checkpoint_carries(folders, evaluate, remote_modules):
    name, folder = "modeling_semtoken_llama.SemTokenLlamaForCausalLM", str(folders / "semtoken")
    model = dynamic_module_utils.get_class_from_dynamic_module(name, folder).from_pretrained(folder).eval()
    assert not isinstance(model, semtoken_hf.SemTokenLlamaForCausalLM)
    tasks = ["choices", "answers"]
    remote, local = evaluate(loaded(model), tasks), evaluate("semtoken", tasks, pretrained=folder)
    assert remote[1] == local[1]
    assert remote[0]["config"]["semtoken"] == local[0]["config"]["semtoken"]


@pytest.mark.parametrize(
    ("options", "batch_size"), [({}, 1), ({"target_ratio": 4.0}, 3), ({"num_beams": 2}, 3)], ids=str
)
def test_answers_are_those_of_generate(evaluate, options, batch_size):
    model = tiny_model(**FIELDS)
    results, answers = evaluate(loaded(model, batch_size=batch_size), ["answers"], gen_kwargs=options or None)
    wanted = [generated(model, context, **options) for context in CONTEXTS]
    assert [row[0] for row in answers["answers"]] == [text for text, _, _ in wanted]
    read = results["config"]["semtoken"]["generate_until"]
    merged = [(tokens, slots) for _, tokens, slots in wanted if slots < tokens]
    assert read == {
        "compressed": len(LONG),
        "tokens": sum(tokens for tokens, _ in merged),
        "slots": sum(slots for _, slots in merged),
        "plain": len(SHORT),
    }
