from transformers import pipeline

from semtoken_hf.evaluation.provenance import markdown_provenance
from semtoken_hf.evaluation.side_by_side import read_side_by_side, side_by_side_table
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


def test_both_readings_are_measured_and_tabled():
    tokenizer = tiny_tokenizer()
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    readings = read_side_by_side(pipe, PROSE, max_new_tokens=4, repetitions=2, target_ratio=3.0)
    plain, ours = readings["plain"], readings["SemToken"]
    tokens = len(tokenizer(PROSE)["input_ids"])
    assert (plain.tokens, plain.slots, ours.tokens, ours.slots) == (tokens, tokens, tokens, -(-tokens // 3))
    # 2 layers, keys and values, 2 heads of 16, float32
    assert plain.kv_bytes == tokens * 2 * 2 * 2 * 16 * 4
    assert plain.kv_bytes / ours.kv_bytes == plain.slots / ours.slots
    for reading in readings.values():
        assert len(reading.prefill_seconds) == len(reading.decode_seconds) == len(reading.encoder_seconds) == 2
        assert reading.continuation
    assert plain.encoder_seconds == [0.0, 0.0]
    assert 0 < min(ours.encoder_seconds) < min(ours.prefill_seconds)
    table = side_by_side_table(readings)
    assert f"| {plain.slots:,} | {ours.slots:,} | {plain.slots / ours.slots:.2f} x |" in table


def test_provenance_names_command_versions_machine_and_date():
    text = markdown_provenance()
    assert [line.split(":")[0] for line in text.splitlines()] == ["- command", "- versions", "- machine", "- date"]
    assert "torch " in text
