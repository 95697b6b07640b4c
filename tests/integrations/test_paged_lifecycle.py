"""What a request of continuous batching holds lives as long as the request, and is given back however it ends."""

from types import SimpleNamespace

import pytest
import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

from semtoken_hf.serving import slot_table
from semtoken_hf.serving.slot_table import SlotTable
from tests.fixtures.batching import (
    NEW_TOKENS,
    assert_equal_to_generate,
    block_tables,
    generate,
    generate_batch,
    managed,
    model_of,
    prompts_of,
    settings,
    wait_until,
)
from tests.fixtures.tiny import random_ids, tiny_model


def free_bytes(cache):
    if hasattr(cache, "evict_cached_blocks"):  # finished blocks stay there for others with the same ids
        cache.evict_cached_blocks()
        return cache.compute_free_capacity(relative=False)
    return cache.get_num_free_blocks()


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
    # The result is out before the prompt is forgotten.
    slots = SlotTable(300, 0)
    compressed = model.compress(torch.tensor([prompts[0]]))
    first = slots.add("mine", prompts[0], compressed)
    slots.end("mine")
    assert slots.add("mine", prompts[0], compressed)[0] == first[0] + 1
    slots.sweep(set)
    assert len(slots) == 1


def test_cancelled_before_the_loop_hears_of_it(monkeypatch):
    """Transformers drains requests and cancellations one after the other, so that a cancelled request may still run."""
    model = tiny_model(attn_implementation="sdpa")
    manager = model.init_continuous_batching(**settings())
    monkeypatch.setattr(ContinuousBatchingManager, "_generation_loop_body", lambda *args: True)
    scheduler = SimpleNamespace(active_requests={}, waiting_requests={})
    name = manager.add_request(prompts_of()[0])
    manager.cancel_request(name)
    manager._generation_loop_body(SimpleNamespace(scheduler=scheduler), False)
    assert len(manager.slots) == 1
    scheduler.waiting_requests[name] = manager.input_queue.get()
    manager._generation_loop_body(SimpleNamespace(scheduler=scheduler), False)
    assert len(manager.slots) == 1
    scheduler.waiting_requests.clear()
    manager._generation_loop_body(SimpleNamespace(scheduler=scheduler), False)
    assert len(manager.slots) == 0


def test_ids_run_out(monkeypatch):
    model = tiny_model(attn_implementation="sdpa")
    monkeypatch.setattr(slot_table, "LAST_ID", model.config.vocab_size)
    manager = model.init_continuous_batching(**settings())
    manager.add_request(prompts_of()[0])
    with pytest.raises(OverflowError, match="new manager"):
        manager.add_request(prompts_of()[1])
    assert len(manager.slots) == 1
