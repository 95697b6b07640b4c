"""`semtoken generate`: the text that the library writes, and true figures of how the prompt was read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf.cache_semtoken import cache_bytes
from semtoken_hf.cli.reading import encode, load, read_on
from tests.fixtures.command_line import run_command, run_json
from tests.fixtures.tiny import plain_twin, tiny_model, tiny_tokenizer
from tests.hub.hub_server import OWNER, STRANGER

NEW = ("--max-new-tokens", "6")


def expected(folder, text, **call):
    """Text, tokens and the cache behind the prompt, by the library."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, **call, max_new_tokens=6)[0, tokens:]
    cache = model.generate(**inputs, **call, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    return tokenizer.decode(ids, skip_special_tokens=True), tokens, cache


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_the_record_is_what_the_library_does(semtoken, text_file, ratio):
    record = run_json("generate", semtoken, "--file", text_file, *NEW, *(["--target-ratio", ratio] if ratio else []))
    text, tokens, cache = expected(semtoken, text_file.read_text(), target_ratio=ratio)
    assert (record["text"], record["tokens"], record["slots"]) == (text, tokens, int(cache.compressed_lengths[0]))
    assert record["slots"] < record["tokens"]
    assert record["ratio"] == record["tokens"] / record["slots"]
    assert record["kv_bytes"] == cache_bytes(cache)
    assert (record["new_tokens"], record["budget_met"]) == (6, True)
    assert record["slots"] <= record["budget"] == -(-tokens // (ratio or 2.4))
    seconds = record["seconds"]
    assert 0 < seconds["prefill"] < seconds["total"]
    assert seconds["per_token"] == pytest.approx((seconds["total"] - seconds["prefill"]) / 5)


def test_the_text_streams_and_the_line_is_on_standard_error(semtoken, text_file):
    record = run_json("generate", semtoken, "--file", text_file, *NEW)
    done = run_command("generate", semtoken, "--file", text_file, *NEW, "--quiet")
    assert done.stdout == record["text"] + "\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"{record['tokens']} tokens -> {record['slots']} slots ({record['ratio']:.2f} tokens per slot)"
    )
    assert "KV cache" in line
    assert "prefill" in line


def test_plain_is_the_plain_model(semtoken, text_file):
    record = run_json("generate", semtoken, "--file", text_file, *NEW, "--plain")
    tokenizer, model = tiny_tokenizer(), plain_twin(tiny_model())
    inputs = tokenizer(text_file.read_text(), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert record["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert record["slots"] == record["tokens"]
    assert (record["budget"], record["budget_met"], record["ratio"]) == (None, None, 1.0)


def test_fields_and_a_budget_that_cannot_be_met(semtoken, text_file):
    fields = ["--set", "max_span_length=2", "recent_window=64", "--target-ratio", "8"]
    record = run_json("generate", semtoken, "--file", text_file, *NEW, *fields)
    assert record["budget_met"] is False
    assert record["slots"] > record["budget"]
    shown = run_command("generate", semtoken, "--file", text_file, *NEW, *fields).stderr
    assert f"the budget of {record['budget']} slots was not met" in shown


def test_slots_are_those_of_the_prompt_though_text_is_merged_later(semtoken, text_file):
    new = ("--max-new-tokens", "60", "--set", "min_prompt_length=4")
    plain, merging = (
        run_json("generate", semtoken, "--file", text_file, *new, *f) for f in ([], ["recompress_every=8"])
    )
    assert plain["text"] != merging["text"]
    assert all(plain[name] == merging[name] for name in ("slots", "budget", "kv_bytes"))


def test_a_short_prompt_says_why_it_is_plain(semtoken):
    done = run_command("generate", semtoken, "the cat", *NEW)
    assert "read plain: shorter than min_prompt_length (16)" in done.stderr


def test_prompts_come_from_three_places(semtoken, text_file):
    text = text_file.read_text()
    records = [
        run_json("generate", semtoken, text, *NEW),
        run_json("generate", semtoken, "--file", "-", *NEW, stdin=text),
        run_json("generate", semtoken, *NEW, stdin=text),
    ]
    assert len({(record["text"], record["slots"]) for record in records}) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_the_tokens_of_the_question_are_marked(semtoken, chat):
    _, tokenizer = load(str(semtoken), {}, False, None)
    prompt = "the cat sat on the mat. " * 4 + "who sat? "
    inputs = encode(tokenizer, prompt, "who sat?", chat)
    marked = inputs["input_ids"][0][inputs["query_mask"][0].bool()]
    assert tokenizer.decode(marked).strip() == "who sat?"
    # The last one, not the one that the text holds already; the template stays whole.
    behind = inputs["query_mask"][0].flip(0).nonzero()[0]
    assert behind.item() < 8
    assert ("protected_mask" in inputs) == chat


def test_a_question_steers(semtoken, text_file):
    model, tokenizer = load(str(semtoken), {"segmentation_mode": "sentence"}, False, None)
    fields = ["--set", "segmentation_mode=sentence", "--question", "the dog ran?"]
    record = run_json("generate", semtoken, "--file", text_file, *NEW, *fields)
    inputs = encode(tokenizer, text_file.read_text(), "the dog ran?", False)
    reading, ids = read_on(model, inputs, max_new_tokens=6)
    assert record["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert (record["tokens"], record["slots"]) == (inputs["input_ids"].shape[1], reading.slots)


def test_a_chat_reads_the_template(semtoken, text_file):
    record = run_json("generate", semtoken, "--file", text_file, "--chat", *NEW)
    tokenizer = AutoTokenizer.from_pretrained(semtoken)
    messages = [{"role": "user", "content": text_file.read_text()}]
    assert record["tokens"] == len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def test_sampling_depends_on_the_seed_alone(semtoken, text_file):
    def text(*options):
        return run_json("generate", semtoken, "--file", text_file, *NEW, *options)["text"]

    greedy, torch_seed = text(), torch.initial_seed()
    warm = [text("--temperature", 5, "--seed", seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1]
    assert len({greedy, *warm}) == 3
    assert text("--greedy", "--seed", 1) == greedy
    torch.manual_seed(torch_seed)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "--file", "y"], 2, "give the prompt once"),
        (["x", "--plain", "--target-ratio", "2"], 2, "exclude each other"),
        (["x", "--target-ratio", "0.5"], 2, "--target-ratio"),
        (["x", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["x", "--dtype", "float12"], 2, "bfloat16"),
        ([" "], 1, "error: the prompt is empty"),
        (["x", "--question", " "], 1, "error: the question is empty"),
        (["--file", "/nowhere/text.txt"], 1, "No such file"),
        (["x", "--set", "ratio=4"], 1, "error: --set: ['ratio'] are no compression fields"),
        (["x", "--set", "hidden_size=32"], 1, "error: --set: ['hidden_size'] are no compression fields"),
        (["x", "--set", "recent_window=-1"], 1, "`recent_window` must be"),
        (["x", "--set", "recent_window"], 2, "--set takes NAME=VALUE"),
        (["x", "--device", "nonsense"], 1, "error: --device nonsense cannot be used here"),
        (["x", "--attn-implementation", "flash_attention_2"], 1, "error: FlashAttention2"),
    ],
)
def test_mistakes_end_with_one_line(semtoken, arguments, code, message):
    done = run_command("generate", semtoken, *arguments, "--quiet", code=code)
    assert message in done.stderr
    assert done.stdout == ""
    assert code == 2 or done.stderr.count("\n") == 1


def test_what_is_no_semtoken_checkpoint(tmp_path, make_llama):
    assert "`semtoken convert` makes" in run_command("generate", make_llama(), "x", code=1).stderr
    nowhere = run_command("generate", tmp_path / "none", "x", code=1).stderr
    assert nowhere == f"error: there is no folder {tmp_path / 'none'}\n"


@pytest.mark.parametrize("content", ["{}", "{", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_one_line(semtoken, tmp_path, text_file, content):
    folder = shutil.copytree(semtoken, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(content)
    for command in (["generate", folder, "x"], ["inspect", folder, text_file]):
        (line,) = run_command(*command, "--quiet", code=1).stderr.splitlines()
        assert line.startswith(f"error: the tokenizer of {folder} cannot be read: ")


def test_a_configuration_of_the_wrong_kind_is_one_line(semtoken, tmp_path):
    folder = shutil.copytree(semtoken, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_config": 3}))
    (line,) = run_command("generate", folder, "x", "--quiet", code=1).stderr.splitlines()
    assert line.startswith("error: `encoder_config` must be a dict")


def test_text_that_is_none(semtoken, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in run_command("generate", semtoken, "--file", tmp_path / "x.bin", code=1).stderr


def test_the_hub_says_no(hub, make_checkpoint, monkeypatch):
    run_command("push", make_checkpoint(), "me/private", "--quiet")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    for name in ("me/private", "me/none"):
        (line,) = run_command("generate", name, "x", "--quiet", code=1).stderr.splitlines()
        assert line.startswith("error: ")
        assert name in line
    monkeypatch.setenv("HF_TOKEN", OWNER)
    hub.refuse = ("GET", "/me/private/")
    (line,) = run_command("generate", "me/private", "x", "--quiet", code=1).stderr.splitlines()
    assert line.startswith("error: ")
    hub.refuse = None


def test_a_checkpoint_of_the_hub(hub, make_checkpoint, text_file):
    folder = make_checkpoint()
    run_command("push", folder, "me/tiny", "--quiet")
    from_hub, local = (run_json("generate", name, "--file", text_file, *NEW) for name in ("me/tiny", folder))
    assert (from_hub["text"], from_hub["slots"]) == (local["text"], local["slots"])
