import statistics

from transformers import pipeline

from semtoken_hf.evaluation.provenance import markdown_provenance
from semtoken_hf.evaluation.side_by_side import read_side_by_side, side_by_side_table
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


def test_both_readings_are_measured_and_tabled():
    tokenizer = tiny_tokenizer()
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    prompts = [PROSE, PROSE[10:]]
    readings = read_side_by_side(pipe, prompts, max_new_tokens=4, repetitions=2, target_ratio=3.0)
    plain, ours = readings["plain"], readings["SemToken"]
    tokens = [len(tokenizer(text)["input_ids"]) for text in prompts for _ in range(2)]
    assert plain.tokens == plain.slots == ours.tokens == tokens
    assert ours.slots == [-(-n // 3) for n in tokens]
    # 2 layers, keys and values, 2 heads of 16, float32
    assert plain.kv_bytes == [n * 2 * 2 * 2 * 16 * 4 for n in tokens]
    assert ours.kv_bytes == [n * 2 * 2 * 2 * 16 * 4 for n in ours.slots]
    for reading in readings.values():
        assert len(reading.prefill_seconds) == len(reading.decode_seconds) == len(reading.encoder_seconds) == 4
        assert len(reading.answers) == 2
    assert plain.encoder_seconds == [0.0] * 4
    assert 0 < min(ours.encoder_seconds) < min(ours.prefill_seconds)
    slots = [statistics.median(reading.slots) for reading in (plain, ours)]
    assert f"| {slots[0]:,.0f} | {slots[1]:,.0f} | {slots[0] / slots[1]:.2f} x |" in side_by_side_table(readings)


def test_a_chat_is_read_in_the_template_as_the_pipeline_reads_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
    )
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer)
    chat = [{"role": "user", "content": PROSE}]
    readings = read_side_by_side(pipe, [chat], max_new_tokens=4)
    plain = pipe(chat, max_new_tokens=4, do_sample=False, compression=False, return_full_text=False)
    assert readings["plain"].answers == [plain[0]["generated_text"].strip()]
    ours = pipe(chat, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert readings["SemToken"].answers == [ours[0]["generated_text"].strip()]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert readings["plain"].tokens == [len(ids)]


def test_provenance_names_command_versions_machine_and_date():
    text = markdown_provenance()
    assert [line.split(":")[0] for line in text.splitlines()] == ["- command", "- versions", "- machine", "- date"]
    assert "torch " in text
