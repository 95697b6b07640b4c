"""Eight threads that generate at the same time on one model object get what one thread gets."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from semtoken_hf import SpanPlanner
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model, tiny_tokenizer

THREADS = 8
TEXTS = ["the cat sat on the mat and the dog ran to the man " * n for n in (2, 4, 5, 7)]


def merging_model(**fields):
    """A model whose learned merger adds something."""
    model = tiny_model(merge_mode="learned", merger_rank=4, **fields)
    with torch.no_grad():
        model.base_model.learned_merger.out_proj.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model


MODELS = {
    "llama, sentence": lambda: tiny_model(merge_mode="representative", segmentation_mode="sentence"),
    "qwen3, varlen, learned": lambda: merging_model(family="qwen3", attn_implementation="semtoken_varlen"),
    "adapter": adapted_model,
    "recompress": lambda: tiny_model(recompress_every=13, min_prompt_length=16, attn_implementation="semtoken_varlen"),
}


class Kept(BaseStreamer):
    """What a streamer was given."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.pieces.append("end")


def generate(model, new_tokens=4, **options):
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "output_scores": True, **options}
    return model.generate(**options, return_dict_in_generate=True)


def calls_of(model):
    """Functions without arguments, each with a result of its own."""
    ids, (rows, mask) = random_ids(1, 90), ragged_prompts((80, 47, 20))
    longer, short = random_ids(1, 120, seed=3), random_ids(1, 12, seed=4)
    marked = torch.zeros_like(ids)
    marked[:, 20:40] = 1

    def streamed():
        streamer = Kept()
        generate(model, input_ids=ids, streamer=streamer, target_ratio=5.0)
        return streamer.pieces

    def decoded():
        found = generate(model, input_ids=longer, new_tokens=28, target_ratio=3.0)
        return found.sequences, found.past_key_values.get_seq_length(), found.past_key_values.slot_lengths

    def planned():
        prompt = model.compress(longer, target_ratio=6.0)
        return prompt.span_ids, prompt.inputs_embeds

    def beams():
        return result_of(generate(model, input_ids=ids, num_beams=2, target_ratio=4.0))

    def states():
        with torch.no_grad():
            return model(rows, attention_mask=mask, logits_to_keep=2, output_hidden_states=True).hidden_states

    return {
        "plain": lambda: result_of(generate(model, input_ids=ids, compression=False)),
        "default": lambda: result_of(generate(model, input_ids=ids)),
        "padded": lambda: result_of(generate(model, input_ids=rows, attention_mask=mask, target_ratio=3.0)),
        "marked": lambda: result_of(generate(model, input_ids=ids, protected_mask=marked, query_mask=marked)),
        "drafts": lambda: result_of(generate(model, input_ids=longer, prompt_lookup_num_tokens=3, target_ratio=2.0)),
        "chunks": lambda: result_of(generate(model, input_ids=longer, prefill_chunk_size=16)),
        "short": lambda: result_of(generate(model, input_ids=short)),
        "streamed": streamed,
        "decoded": decoded,
        "planned": planned,
        "beams": beams,
        "states": states,
    }


def result_of(found):
    return found.sequences, found.scores, found.past_key_values.get_seq_length()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def run_at_once(calls, repetitions=1):
    """Names of the calls that came out otherwise in any of the threads than in one thread alone."""
    with ThreadPoolExecutor(1) as alone:  # not this thread, which may have another number of threads within
        expected = alone.submit(lambda: {name: call() for name, call in calls.items()}).result()
    barrier, names = threading.Barrier(THREADS), list(calls)

    def work(number):
        start = number * len(names) // THREADS
        wrong = []
        for _ in range(repetitions):
            barrier.wait(60)
            for name in names[start:] + names[:start]:
                if not equal(calls[name](), expected[name]):
                    wrong.append(name)
        return wrong

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return {name for wrong in pool.map(work, range(THREADS)) for name in wrong}
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", MODELS)
def test_threads_do_not_disturb_each_other(name):
    model = MODELS[name]()
    assert run_at_once(calls_of(model)) == set()


def test_planning_in_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.planner = SpanPlanner.from_model(tiny_model())
    calls = {
        f"{number} {ratio}": lambda text=text, ratio=ratio: sorted(
            tokenizer(text, return_span_ids=True, return_protected_mask=True, target_ratio=ratio).items()
        )
        for number, text in enumerate(TEXTS)
        for ratio in (1.5, 2.4, 6.0)
    }
    assert run_at_once(calls, repetitions=2) == set()
