"""The manager of continuous batching whose requests are compressed; how it works is told in `slot_table.py`.

A checkpoint's own code does not have it: there, continuous batching runs the plain model, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

from ..compression import CompressedPrompt, log_prefill
from ..generation_semtoken import GENERATION_FIELDS
from ..logging_semtoken import get_logger
from .slot_table import SlotStep, SlotTable, moving_rope_types

logger = get_logger(__name__)

# Of Transformers, overridden here: without one of them prompts cannot be compressed.
HOOKS = (
    "_create_batch_processor",
    "_generation_loop_body",
    "_generation_step",
    "_run_generation_loop",
    "add_request",
    "cancel_request",
)
# Of the runner: what replays or compiles a forward that was seen before.
RECORDED_FORWARDS = {
    "use_cuda_graph_varlen": False,
    "use_cuda_graph_decode": False,
    "_compiled_varlen": None,
    "_compiled_decode": None,
}


class SemTokenOutputRouter(OutputRouter):
    """Results with the prompts that the callers gave."""

    def __init__(self, slots: SlotTable):
        super().__init__()
        self.slots = slots

    def deliver(self, output: Any) -> None:
        super().deliver(self.slots.restore(output))

    def deliver_batch(self, outputs: list[Any]) -> None:
        super().deliver_batch([self.slots.restore(output) for output in outputs])


class SemTokenContinuousBatchingManager(ContinuousBatchingManager):
    """`ContinuousBatchingManager` that compresses what is added."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        first_id = max(model.config.vocab_size, model.get_input_embeddings().weight.shape[0])
        self.slots = SlotTable(first_id, self.num_return_sequences - 1)
        self.output_router = SemTokenOutputRouter(self.slots)

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        compression: bool | None = None,
        target_ratio: float | None = None,
        query_weight: float | None = None,
        span_ids: Any = None,
        protected_mask: Any = None,
        query_mask: Any = None,
        **kwargs: Any,
    ) -> str | None:
        """As in Transformers, over slots.

        Args:
            input_ids: the n token ids of the prompt.
            compression, target_ratio, query_weight: as in the model's `forward`.
            span_ids, protected_mask, query_mask: as there, n numbers each.

        Raises:
            ValueError: as in `compress`; or a live request has this `request_id`.
        """
        if not self.is_tp_driver:
            return None
        given = {"compression": compression, "target_ratio": target_ratio, "query_weight": query_weight}
        options = {name: getattr(self.generation_config, name, None) for name in GENERATION_FIELDS}
        options |= {name: value for name, value in given.items() if value is not None}
        masks = {"span_ids": span_ids, "protected_mask": protected_mask, "query_mask": query_mask}
        prompt = self._compress(input_ids, masks, **options)
        if prompt is None:
            return super().add_request(input_ids, request_id, *args, **kwargs)
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        ids, added = self.slots.add(request_id, list(input_ids), prompt), None
        try:
            added = super().add_request(ids, request_id, *args, **kwargs)
        finally:
            if added is None:
                self.slots.drop(request_id)
        return added

    @torch.no_grad()
    def _compress(
        self,
        input_ids: list[int],
        masks: dict[str, Any],
        compression: bool | None = None,
        target_ratio: float | None = None,
        query_weight: float | None = None,
    ) -> CompressedPrompt | None:
        """The prompt as slots, or None where it is read as it is."""
        model: Any = self.model
        ids = torch.tensor([list(input_ids)], device=model.device)
        if not model._wants_compression(compression, target_ratio) or model._is_short(ids.shape[1]):
            return None
        if (reason := self._unsupported_reason()) is not None:
            model._warn_uncompressed(reason)
            return None
        rows = {name: None if v is None else torch.as_tensor(v, device=ids.device)[None] for name, v in masks.items()}
        prompt = model.compress(ids, target_ratio=target_ratio, query_weight=query_weight, **rows)
        log_prefill(prompt)
        return prompt if prompt.is_merged else None

    def _unsupported_reason(self) -> str | None:
        """Why no prompt of this manager can be compressed, or None."""
        if self.distributed_helper.tp_size > 1:
            return "continuous batching on several devices would need the slots on each of them"
        config = self.model.config
        if config.position_mode == "original" and (kinds := moving_rope_types(config)):
            return (
                f"rope_type {sorted(kinds)} depends on absolute positions, which continuous batching counts by itself; "
                "use position_mode='compact'"
            )
        return None

    def cancel_request(self, request_id: str) -> None:
        super().cancel_request(request_id)
        # Behind it: what the loop has not heard of yet still lives.
        self.slots.end(request_id)

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()
        # Every forward gets this cache, and finds there what it reads.
        processor.cache.slot_step = SlotStep()
        return processor

    def _generation_step(self) -> None:
        processor: Any = self.batch_processor
        io = processor.inputs_and_outputs
        if hasattr(io, "io_pairs"):  # asynchronous batching: two batches in turn
            io = io.io_pairs[io.current_pair].host_io
        has_adapter = self.model.config.adapter_subfolder is not None
        step = self.slots.step_of(io.requests_in_batch, has_adapter)
        processor.cache.slot_step = step
        with _unrecorded(processor.model_runner, not step.is_plain):
            super()._generation_step()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        scheduler = batch_processor.scheduler
        self.slots.sweep(lambda: self._queued() | set(scheduler.active_requests) | set(scheduler.waiting_requests))
        return goes_on

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:  # every request ended by now, some of them behind the last sweep
            self.slots.sweep(self._queued)

    def _queued(self) -> set[str]:
        """Requests that the loop has not heard of yet."""
        with self.input_queue.mutex:
            return {state.request_id for state in self.input_queue.queue}


@contextmanager
def _unrecorded(runner: Any, applies: bool) -> Iterator[None]:
    """Within this block, if `applies`, a runner calls the model itself: a recorded forward knows nothing of slots."""
    recorded = {name: getattr(runner, name) for name in RECORDED_FORWARDS} if applies else {}
    for name in recorded:
        setattr(runner, name, RECORDED_FORWARDS[name])
    try:
        yield
    finally:
        for name, value in recorded.items():
            setattr(runner, name, value)


def init_continuous_batching(
    model: Any,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> SemTokenContinuousBatchingManager | None:
    """`ContinuousMixin.init_continuous_batching` for a new manager, which there is named in the code.

    Returns:
        None, with a warning, where Transformers lacks a method that has to be overridden.
    """
    if missing := [name for name in HOOKS if not hasattr(ContinuousBatchingManager, name)]:
        model._warn_uncompressed(f"continuous batching of this version of Transformers has no {missing}")
        return None
    if model.config.recompress_every is not None:
        logger.warning_once(
            "`recompress_every` has no effect in continuous batching: generated tokens keep their slots"
        )
    generation_config = model.generation_config if generation_config is None else generation_config
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # as Transformers says that there is none
    if continuous_batching_config is None:
        given = getattr(generation_config, "continuous_batching_config", None)
        continuous_batching_config = ContinuousBatchingConfig() if given is None else given
    return SemTokenContinuousBatchingManager(
        model=model,
        generation_config=generation_config,
        continuous_batching_config=continuous_batching_config,
        workload_hints=workload_hints,
    )


__all__ = ["SemTokenContinuousBatchingManager", "init_continuous_batching"]
