"""Continuous batching reads slots: each request as `generate` reads it alone, in fewer blocks, all given back."""

import asyncio
import functools
import math
import time

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

from semtoken_hf import continuous_batching_semtoken, paged_semtoken
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import BERT, plain_twin, random_ids, tiny_model

NEW_TOKENS = 6
# The third is shorter than `min_prompt_length`.
LENGTHS = (96, 40, 12, 70, 133)
# Smaller than a prompt, so that its slots are split over several steps.
STEP_TOKENS = 24
BLOCK = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BLOCK_SIZE_NAME = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


def prompts_of(lengths=LENGTHS, seed=0):
    return [random_ids(1, n, seed + n)[0].tolist() for n in lengths]


@functools.cache
def model_of(**fields):
    model = tiny_model(**{"attn_implementation": "sdpa", **fields})
    if model.model.learned_merger is not None:
        torch.nn.init.normal_(model.model.learned_merger.out_proj, std=0.1)
    return model.requires_grad_(False)


def settings(generation=None, **batching):
    """Arguments of the entry points, greedy by default."""
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    batching = {"num_blocks": 256, "max_batch_tokens": STEP_TOKENS, BLOCK_SIZE_NAME: BLOCK, **batching}
    return {
        "generation_config": GenerationConfig(**{**greedy, **(generation or {})}),
        "continuous_batching_config": ContinuousBatchingConfig(**batching),
    }


def generate_batch(model, prompts, generation=None, batching=None, **arguments):
    outputs = model.generate_batch(prompts, **settings(generation, **(batching or {})), **arguments)
    assert [output.prompt_ids for output in outputs.values()] == prompts
    assert all(output.error is None for output in outputs.values())
    return list(outputs.values())


def generate(model, prompt, **arguments):
    """Tokens of `generate` for one prompt, their log-probabilities, and how many slots the prompt took."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    tokens = out.sequences[0, len(prompt) :]
    scores = torch.stack(out.logits, dim=1)[0].log_softmax(-1)
    return tokens.tolist(), scores.gather(1, tokens[:, None])[:, 0], out.past_key_values


def assert_equal_to_generate(model, prompts, outputs, **arguments):
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, scores, cache = generate(model, prompt, **arguments)
        assert output.generated_tokens == tokens
        if output.logprobs:
            torch.testing.assert_close(torch.tensor(output.logprobs), scores, **CLOSE)
        # Else the comparison would say nothing.
        assert cache.is_compressed == (len(prompt) > 16)


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.name.startswith("semtoken_hf")]


def block_tables(cache):
    """Blocks of every request, by its id."""
    managers = getattr(cache, "group_cache_managers", None) or cache.cache_allocators.values()
    return {name: blocks for m in managers for name, blocks in m.block_table.items() if blocks}


def free_bytes(cache):
    if hasattr(cache, "evict_cached_blocks"):  # finished blocks stay there for others with the same ids
        cache.evict_cached_blocks()
        return cache.compute_free_capacity(relative=False)
    return cache.get_num_free_blocks()


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


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to be")


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
    assert_equal_to_generate(model, prompts_of(), generate_batch(model, prompts_of()))
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


def test_requests_that_make_room_for_others(monkeypatch):
    """Evicted requests are read again from their first slot, with the tokens that they had generated."""
    reset, again = RequestState.create_equivalent_initial_request, []
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: again.append((state.request_id, len(state.generated_tokens))) or reset(state),
    )
    model, prompts = model_of(), prompts_of((120, 121, 122, 123))
    manager = model.init_continuous_batching(**settings(num_blocks=27, max_batch_tokens=128, safety_margin=0.0))
    # All before the first step, so that what fits does not depend on their arrival.
    names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
    manager.start()
    results = {r.request_id: r for r in (manager.get_result(timeout=20) for _ in names)}
    manager.stop()
    assert any(generated for _, generated in again)
    assert [results[name].prompt_ids for name in names] == prompts
    assert_equal_to_generate(model, prompts, [results[name] for name in names])


def managed(model, generation=None, **batching):
    return model.continuous_batching_context_manager(**settings(generation, **batching))


@pytest.mark.parametrize("sharing", [True, False])
def test_ids_are_never_used_again(sharing):
    """Blocks are found again by a hash of their ids: another prompt must not find these."""
    model, prompts, outputs = model_of(), [], []
    for seed in range(3):
        # The second time, the short prompt finds its blocks and the long one must not find any.
        prompts += 2 * [random_ids(1, 96, seed)[0].tolist(), prompts_of((14,), seed)[0]]
    with managed(model, allow_block_sharing=sharing, num_blocks=1024) as manager:
        assert manager._use_prefix_sharing == sharing
        for prompt in prompts:
            manager.add_request(prompt, max_new_tokens=NEW_TOKENS)
            outputs.append(manager.get_result(timeout=20))
            wait_until(lambda: len(manager.slots) == 0)
    assert_equal_to_generate(model, prompts, outputs)


def test_everything_is_given_back():
    model, prompts = model_of(), prompts_of()
    with managed(model) as manager:
        wait_until(lambda: manager.batch_processor is not None)
        cache = manager.batch_processor.cache
        free = free_bytes(cache)
        names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
        assert len(manager.slots) > 0
        results = [manager.get_result(timeout=20) for _ in names]
        assert {r.request_id for r in results} == set(names)
        wait_until(lambda: len(manager.slots) == 0)
        assert not block_tables(cache)

        running = manager.add_request(prompts[0], max_new_tokens=10_000, streaming=True)
        assert manager.get_result(timeout=20).request_id == running
        assert block_tables(cache)
        assert len(manager.slots) == 1
        manager.cancel_request(running)
        wait_until(lambda: len(manager.slots) == 0)
        assert not block_tables(cache)

        # This one is refused by the loop; the other is not disturbed.
        failing = manager.add_request(prompts[0], request_id="failing", temper="hot")
        going = manager.add_request(prompts[0], request_id="going", max_new_tokens=NEW_TOKENS)
        wait_until(lambda: len(manager.slots) == 0)
        results = {}
        while len(results) < 2:
            result = manager.get_result(timeout=20)
            if result.is_finished():
                results[result.request_id] = result
        assert "temper" in results[failing].error
        assert results[failing].prompt_ids == prompts[0]
        assert not block_tables(cache)
        assert free_bytes(cache) == free
    assert results[going].generated_tokens == generate(model, prompts[0])[0]


def test_a_step_that_fails(monkeypatch):
    model, prompts, forward = model_of(), prompts_of(), type(model_of()).forward
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", fail)
    manager = model.init_continuous_batching(**settings())
    names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
    assert len(manager.slots) == len(prompts) - 1
    manager.start()
    wait_until(lambda: not manager.is_running())
    cache = manager.batch_processor.cache
    results = {r.request_id: r for r in (manager.output_router.output_queue.get() for _ in names)}
    assert [results[name].prompt_ids for name in names] == prompts
    assert all("out of luck" in result.error for result in results.values())
    assert len(manager.slots) == 0
    assert not block_tables(cache)
    manager.stop()
    monkeypatch.undo()
    # The next one starts afresh.
    assert_equal_to_generate(model, prompts, generate_batch(model, prompts))


def test_stop_and_cancel_before_start():
    model, prompts = model_of(), prompts_of()
    manager = model.init_continuous_batching(**settings())
    names = manager.add_requests(prompts, max_new_tokens=10_000)
    manager.cancel_request(names[0])
    assert len(manager.slots) == len(prompts) - 1
    manager.start()
    wait_until(lambda: len(manager.slots) == len(prompts) - 2)
    assert manager.slots.get(names[0]) is None
    manager.stop(hard_stop=True)
    assert len(manager.slots) == 0
    assert manager.add_request(prompts[0]) is None
    assert len(manager.slots) == 0


def test_forked_requests():
    """The prompt is compressed once and lives as long as any of the sequences that were asked for."""
    model, prompts = model_of(), prompts_of()
    sampling = {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    with managed(model, generation=sampling) as manager:
        names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
        results = [manager.get_result(timeout=20) for _ in range(3 * len(prompts))]
        wait_until(lambda: len(manager.slots) == 0)
    assert len({r.request_id for r in results}) == 3 * len(prompts)
    for result in results:
        prompt = prompts[names.index(result.request_id.split("__")[0])]
        assert result.prompt_ids == prompt
        assert result.generated_tokens == generate(model, prompt)[0]


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


def test_one_request_id_at_a_time():
    model, prompts = model_of(), prompts_of()
    manager = model.init_continuous_batching(**settings())
    manager.add_request(prompts[0], request_id="mine", max_new_tokens=2)
    with pytest.raises(ValueError, match="'mine' is running"):
        manager.add_request(prompts[1], request_id="mine", max_new_tokens=2)
    manager.start()
    manager.get_result(timeout=20)
    assert manager.add_request(prompts[1], request_id="mine", max_new_tokens=2) == "mine"
    assert manager.get_result(timeout=20).prompt_ids == prompts[1]
    manager.stop()


def test_ids_run_out(monkeypatch):
    model = tiny_model(attn_implementation="sdpa")
    monkeypatch.setattr(paged_semtoken, "LAST_ID", model.config.vocab_size)
    manager = model.init_continuous_batching(**settings())
    manager.add_request(prompts_of()[0])
    with pytest.raises(OverflowError, match="new manager"):
        manager.add_request(prompts_of()[1])
    assert len(manager.slots) == 1


def test_arguments_of_one_prompt():
    """What steers the compression of a single prompt goes to `add_request`."""
    model = model_of(query_weight=4.0, segmentation_mode="greedy", similarity_threshold=-1.0)
    prompt = prompts_of()[0]
    mask = [int(8 <= i < 12) for i in range(len(prompt))]
    arguments = {"protected_mask": mask, "query_mask": mask}
    with managed(model) as manager:
        manager.add_request(prompt, max_new_tokens=NEW_TOKENS, **arguments)
        output = manager.get_result(timeout=20)
        with pytest.raises(ValueError, match=r"`query_mask`.*shape"):
            manager.add_request(prompt, query_mask=mask[1:])
        assert len(manager.slots) == 0
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
    compiled, slots, current = [], [], paged_semtoken._STEP
    run = ContinuousBatchingManager._generation_step

    def compile_nothing(function, **kwargs):
        return lambda *args: compiled.append(current.get().is_plain) or function(*args)

    class Watch:
        highest = 0

        def __call__(self, input_ids, scores):
            self.highest = max(self.highest, int(input_ids.max()))
            return scores

    watch, model = Watch(), model_of()
    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(
        ContinuousBatchingManager, "_generation_step", lambda m: slots.append(not current.get().is_plain) or run(m)
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


def test_transformers_that_changed(caplog, monkeypatch):
    """Without a hook the slots would never be read."""
    model = tiny_model(attn_implementation="sdpa")
    plain = generate_batch(plain_twin(model), prompts_of())
    monkeypatch.setattr(continuous_batching_semtoken, "HOOKS", ("_generation_step", "_no_such_hook"))
    outputs = generate_batch(model, prompts_of())
    assert [o.generated_tokens for o in outputs] == [o.generated_tokens for o in plain]
    assert any("_no_such_hook" in message for message in warnings_of(caplog))
