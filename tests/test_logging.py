"""What is logged, and that the verbosity of Transformers decides whether."""

import json
import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from semtoken_hf.logging_semtoken import get_logger
from tests.fixtures.children import run_clean
from tests.fixtures.logs import LOGGERS
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model


@pytest.fixture
def lines(caplog):
    """A function that returns what was logged at level info since it was last asked."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()

    def take() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name.startswith(LOGGERS) and r.levelno == logging.INFO]
        caplog.clear()
        return found

    yield take
    transformers_logging.set_verbosity(before)


def test_a_prefill_says_tokens_slots_and_bytes(lines):
    model = tiny_model()
    out = model.generate(random_ids(1, 96), max_new_tokens=3, return_dict_in_generate=True)
    (line,) = lines()
    slots = 40
    a_slot = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert line == (
        f"SemToken read 96 tokens in {slots} slots (2.40 per slot); the KV cache takes {slots * a_slot:,} bytes."
    )
    assert out.past_key_values.memory_bytes() == (slots + 2) * a_slot


def test_calls_that_ran_plain_are_counted(lines):
    """Each warns once, and the line after the next prefill says how many there were."""
    model, ids = tiny_model(), random_ids(1, 96)
    for _ in range(2):
        model.generate(ids, max_new_tokens=1, use_cache=False)
    lines()
    model.generate(ids, max_new_tokens=1)
    (line,) = lines()
    assert line.endswith("; 2 calls before it ran plain, as their warnings say.")


@pytest.mark.parametrize("attention", ["sdpa", "semtoken_varlen"])
def test_a_batch_is_one_line_and_padding_counts_in_bytes_alone(lines, attention):
    model = tiny_model(attn_implementation=attention)
    ids, mask = ragged_prompts((96, 70, 41))
    cache = model.generate(ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    (line,) = lines()
    assert line == (
        f"SemToken read 207 tokens in {40 + 30 + 18} slots (2.35 per slot); the KV cache takes "
        f"{cache.memory_bytes():,} bytes."
    )


def test_what_the_budget_could_not_honour_is_named_by_row(lines):
    model, ids = tiny_model(), random_ids(2, 96)
    protected = torch.zeros_like(ids)
    protected[1, :70] = 1
    kept = model.compress(ids, protected_mask=protected).kept_lengths.tolist()
    model.generate(ids, attention_mask=torch.ones_like(ids), protected_mask=protected, max_new_tokens=1)
    _, row = lines()
    assert kept[0] == 40 < 70 < kept[1]
    assert row.startswith(f"Row 1 keeps {kept[1]} slots of a budget of 40: its protected tokens")


def test_a_prompt_in_which_nothing_may_merge_has_its_line_too(lines):
    model, ids = tiny_model(), random_ids(1, 96)
    cache = model(ids, protected_mask=torch.ones_like(ids), logits_to_keep=1).past_key_values
    line, row = lines()
    assert line.startswith("SemToken read 96 tokens in 96 slots (1.00 per slot); the KV cache takes 49,152 bytes.")
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 49152
    assert row.startswith("Row 0 keeps 96 slots of a budget of 40")


def test_each_turn_and_each_request_has_its_line(lines):
    model = tiny_model()
    cache = model(random_ids(1, 96), logits_to_keep=1).past_key_values
    assert "96 tokens in 40 slots" in lines()[0]
    model(random_ids(1, 48, seed=1), past_key_values=cache, logits_to_keep=1)
    (line,) = lines()
    assert "48 tokens in 20 slots" in line
    assert f"{cache.memory_bytes():,} bytes" in line
    model(random_ids(1, 1), past_key_values=cache)
    model(random_ids(1, 96), compression=False)
    model(random_ids(1, 96))
    assert lines() == []


def test_the_verbosity_of_transformers_decides(caplog):
    logger = get_logger("semtoken_hf.somewhere")
    before = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()
        logger.warning("unheard")
        transformers_logging.set_verbosity_warning()
        logger.info("unheard")
        tiny_model()(random_ids(1, 96), logits_to_keep=1)
        logger.warning("heard")
    finally:
        transformers_logging.set_verbosity(before)
    assert [r.getMessage() for r in caplog.records] == ["heard"]


REMOTE = """
import contextlib, io, json, sys
import torch, transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
heard = {}
for name in ("info", "error"):
    getattr(transformers.logging, f"set_verbosity_{name}")()
    handler = transformers.logging._get_library_root_logger().handlers[0]
    handler.stream = io.StringIO()
    torch.manual_seed(0)
    # A cache that holds no slots: a warning; then a prefill: a line.
    model.generate(torch.arange(3, 99)[None], max_new_tokens=2, use_cache=False)
    model(torch.arange(3, 99)[None], logits_to_keep=1)
    heard[name] = handler.stream.getvalue()
print("FACTS" + json.dumps(heard))
"""


def test_remote_code_obeys_as_well(tmp_path):
    from semtoken_hf.conversion.checkpoint import save_code_and_config

    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    save_code_and_config(model.config, tmp_path / "model")
    heard = run_clean(REMOTE, tmp_path / "model", home=tmp_path / "home")
    assert "SemToken read 96 tokens in 40 slots" in heard["info"]
    assert "cannot hold merged slots" in heard["info"]
    assert heard["error"] == "", json.dumps(heard)
