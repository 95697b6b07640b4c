"""Continuous batching reads slots: each request as `generate` reads it alone, in fewer blocks."""

import asyncio
import json
import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from semtoken_hf.serving import continuous_batching
from tests.fixtures.adapted import adapted_model
from tests.fixtures.batching import (
    BATCHING,
    BLOCK,
    GREEDY,
    NEW_TOKENS,
    assert_equal_to_generate,
    block_tables,
    generate,
    generate_batch,
    managed,
    model_of,
    prompts_of,
    settings,
)
from tests.fixtures.children import run_clean, run_python
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import BERT, plain_twin, random_ids, tiny_model


@pytest.fixture
def steps(monkeypatch):
    """Block tables at every step, [(model, tables)]."""
    seen, run = [], ContinuousBatchingManager._generation_step

    def step(manager):
        run(manager)
        tables = block_tables(manager.batch_processor.cache)
        seen.append((manager.model, {name: list(blocks) for name, blocks in tables.items()}))

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", step)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("merge", ["mean", "representative", "learned"])
@pytest.mark.parametrize("position", ["original", "compact"])
def test_equal_to_generate(caplog, position, merge, attention):
    model = model_of(position_mode=position, merge_mode=merge, attn_implementation=attention)
    outputs = generate_batch(model, prompts_of(), batching={"return_logprobs": True})
    assert_equal_to_generate(model, prompts_of(), outputs)
    assert all(len(output.logprobs) == NEW_TOKENS for output in outputs)
    assert not warnings_of(caplog)


def test_options_of_the_call():
    model = model_of()
    plain = generate_batch(plain_twin(model), prompts_of(), batching={"return_logprobs": True})
    for off in ({"compression": False}, {"target_ratio": 1}):
        outputs = generate_batch(model, prompts_of(), batching={"return_logprobs": True}, **off)
        assert [o.generated_tokens for o in outputs] == [o.generated_tokens for o in plain]
        assert [o.logprobs for o in outputs] == [o.logprobs for o in plain]
    outputs = generate_batch(model, prompts_of(), target_ratio=4.0)
    assert_equal_to_generate(model, prompts_of(), outputs, target_ratio=4.0)
    # They do not outlive the call.
    with managed(model) as manager:
        manager.add_request(prompts_of()[0], max_new_tokens=NEW_TOKENS)
        output = manager.get_result(timeout=20)
    assert_equal_to_generate(model, prompts_of()[:1], [output])
    with pytest.raises(ValueError, match=r"target_ratio.*>= 1"):
        model.generate_batch(prompts_of(), **settings(), target_ratio=0.5)
    with pytest.raises(ValueError, match=r"query_mask.*add_request"):
        model.generate_batch(prompts_of(), **settings(), query_mask=[[1]])


def test_blocks_fall_by_the_ratio(steps):
    """At most ceil((m + new tokens) / block size) blocks, where the plain model takes as many for n."""
    model, lengths = model_of(), (160, 240)
    twin = plain_twin(model)
    prompts = prompts_of(lengths)
    for one in (model, twin):
        generate_batch(one, prompts, batching={"max_batch_tokens": 64})
    ours, theirs = (
        {i: max(len(tables.get(f"req_{i}", ())) for m, tables in steps if m is one) for i in range(len(prompts))}
        for one in (model, twin)
    )
    for i, n in enumerate(lengths):
        slots = math.ceil(n / model.config.target_ratio)
        # The last new token is never read.
        assert theirs[i] == math.ceil((n + NEW_TOKENS - 1) / BLOCK)
        assert ours[i] == math.ceil((slots + NEW_TOKENS - 1) / BLOCK)


def test_streaming():
    model, (prompt, other) = model_of(), prompts_of((96, 70))
    tokens = generate(model, prompt)[0]
    with managed(model) as manager:
        name = manager.add_request(prompt, max_new_tokens=NEW_TOKENS, streaming=True)
        for count, output in enumerate(manager.request_id_iter(name), start=1):
            assert output.generated_tokens == tokens[:count]
            assert output.prompt_ids == prompt
        assert count == NEW_TOKENS

        async def serve():
            done = asyncio.get_running_loop().create_future()
            manager.register_result_handler("chat", lambda output: output.is_finished() and done.set_result(output))
            manager.add_request(other, request_id="chat", max_new_tokens=NEW_TOKENS)
            return await asyncio.wait_for(done, 20)

        served = asyncio.run(serve())
    assert_equal_to_generate(model, [other], [served])


def test_arguments_of_one_prompt():
    """What steers the compression of a single prompt goes to `add_request`."""
    model = model_of(segmentation_mode="sentence")
    prompt = prompts_of()[0]
    mask = [int(8 <= i < 12) for i in range(len(prompt))]
    arguments = {"protected_mask": mask, "query_mask": mask}
    with managed(model) as manager:
        manager.add_request(prompt, max_new_tokens=NEW_TOKENS, **arguments)
        output = manager.get_result(timeout=20)
        with pytest.raises(ValueError, match=r"`query_mask`.*shape"):
            manager.add_request(prompt, query_mask=mask[1:])
        manager.add_request(prompt, max_new_tokens=NEW_TOKENS, protected_mask=[1] * len(prompt))
        assert len(manager.slots) == 0
        whole = manager.get_result(timeout=20)
    assert whole.generated_tokens == generate(model, prompt, compression=False)[0]
    assert_equal_to_generate(model, [prompt], [output], **{k: torch.tensor([v]) for k, v in arguments.items()})


def test_adapter_acts_on_compressed_requests_alone():
    model = adapted_model(attn_implementation="sdpa").requires_grad_(False)
    outputs = generate_batch(model, prompts_of(), batching={"return_logprobs": True})
    assert_equal_to_generate(model, prompts_of(), outputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_keeps_its_attention(attention):
    """The language model's is exchanged for a paged one."""
    model = tiny_model(encoder_config=BERT, encoder_window=64, attn_implementation=attention).requires_grad_(False)
    assert_equal_to_generate(model, prompts_of(), generate_batch(model, prompts_of()))


def test_recorded_forwards_read_no_slots(monkeypatch):
    """What is compiled, or replayed as a graph, runs the steps without slots alone.

    Batches are padded then, so that logits processors look at more columns.
    """
    compiled, slots, caches = [], [], []
    run, create = ContinuousBatchingManager._generation_step, ContinuousBatchingManager._create_batch_processor

    def compile_nothing(function, **kwargs):
        return lambda *args: compiled.append(caches[-1].slot_step.is_plain) or function(*args)

    def create_noting(manager):
        processor = create(manager)
        caches.append(processor.cache)
        return processor

    class Watch:
        highest = 0

        def __call__(self, input_ids, scores):
            self.highest = max(self.highest, int(input_ids.max()))
            return scores

    watch, model = Watch(), model_of()
    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", create_noting)
    monkeypatch.setattr(
        ContinuousBatchingManager,
        "_generation_step",
        lambda m: slots.append(not m.batch_processor.cache.slot_step.is_plain) or run(m),
    )
    monkeypatch.setattr(type(model), "_get_logits_processor", lambda *args, **kwargs: LogitsProcessorList([watch]))
    outputs = generate_batch(model, prompts_of(), batching={"varlen_compile_config": CompileConfig()})
    assert any(slots)
    # The warm-up is compiled as well.
    assert all(compiled)
    assert len(compiled) > slots.count(False) > 0
    assert 0 < watch.highest < model.config.vocab_size
    monkeypatch.undo()
    assert_equal_to_generate(model, prompts_of(), outputs)


def test_generate_with_a_paged_cache():
    model, ids = model_of(), torch.cat([random_ids(1, 80, seed) for seed in range(2)])
    generation = settings()["generation_config"]
    # The only way to say how large the cache is.
    generation.continuous_batching_config = settings()["continuous_batching_config"]
    sequences = model.generate(ids, generation, cache_implementation="paged", target_ratio=3.0)[0]
    for row, sequence in zip(ids.tolist(), sequences.tolist(), strict=True):
        assert sequence == row + generate(model, row, target_ratio=3.0)[0]


def test_positions_that_cannot_be_moved(caplog):
    """Frequencies of dynamic rotary embeddings follow the largest position: the plain model runs, and says why."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(attn_implementation="sdpa", rope_parameters=rope).requires_grad_(False)
    plain = generate_batch(plain_twin(model), prompts_of())
    assert [o.generated_tokens for o in generate_batch(model, prompts_of())] == [o.generated_tokens for o in plain]
    (message,) = warnings_of(caplog)
    assert "dynamic" in message
    assert "position_mode='compact'" in message
    model.config.position_mode = "compact"
    assert_equal_to_generate(model, prompts_of(), generate_batch(model, prompts_of()))
    assert len(warnings_of(caplog)) == 1


def test_recompression_is_not_forgotten_silently(caplog):
    model = tiny_model(attn_implementation="sdpa", recompress_every=20)
    generate_batch(model, prompts_of((40,)))
    assert [message for message in warnings_of(caplog) if "`recompress_every` has no effect" in message]


def test_transformers_that_changed(caplog, monkeypatch):
    """Without a hook the slots would never be read."""
    model = tiny_model(attn_implementation="sdpa")
    plain = generate_batch(plain_twin(model), prompts_of())
    monkeypatch.setattr(continuous_batching, "HOOKS", ("_generation_step", "_no_such_hook"))
    outputs = generate_batch(model, prompts_of())
    assert [o.generated_tokens for o in outputs] == [o.generated_tokens for o in plain]
    assert any("_no_such_hook" in message for message in warnings_of(caplog))


REMOTE = """
import json, sys
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
folder, prompts, generation, batching = sys.argv[1], *map(json.loads, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa").eval()
manager = model.init_continuous_batching(GenerationConfig(**generation), ContinuousBatchingConfig(**batching))
assert type(model).__module__.startswith("transformers_modules."), type(model)
names = manager.add_requests(prompts)
manager.start()
results = {r.request_id: r for r in (manager.get_result(timeout=60) for _ in names)}
manager.stop()
print("FACTS" + json.dumps([results[name].generated_tokens for name in names]))
"""


@pytest.mark.parametrize("is_installed", [True, False])
def test_remote_code(tmp_path, is_installed):
    """A checkpoint's own code reads slots where the package can be imported, and the plain prompts elsewhere."""
    model, prompts = model_of(), prompts_of()
    model.save_pretrained(tmp_path / "checkpoint")
    arguments = [tmp_path / "checkpoint", *map(json.dumps, (prompts, GREEDY, BATCHING))]
    home = tmp_path / "home"
    if is_installed:
        tokens = run_python(REMOTE, *arguments, variables={"HF_MODULES_CACHE": str(home)})
    else:
        tokens = run_clean(REMOTE, *arguments, home=home)
    options = {} if is_installed else {"compression": False}
    assert tokens == [generate(model, prompt, **options)[0] for prompt in prompts]
