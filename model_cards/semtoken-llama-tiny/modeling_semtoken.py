"""SemToken on any decoder of Transformers: what a family's base model inherits.

- It compresses before the first layer and hands the layers slots; the rest of the forward is the family's.
- Where nothing merges, the call goes to the family's own forward unchanged (law 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .adapter_semtoken import adapter_acts_on
from .attention_semtoken import flash_attention_kwargs
from .cache_semtoken import SemTokenCache, tracks_slots
from .compression import CompressedPrompt
from .learned_merger import LearnedMerger
from .logging_semtoken import get_logger, log_prefill
from .paged_semtoken import step_of_call
from .pretrained_semtoken import SemTokenPreTrainedMixin
from .ragged_cache_semtoken import ranges
from .ragged_modeling_semtoken import SemTokenRaggedMixin
from .semantic_encoder import SemanticEncoder

logger = get_logger(__name__)


@dataclass
class SemTokenModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` over slots.

    Args:
        span_ids: int64 [B, T], slot of every token, -1 for padding; None where nothing merged.
        compressed_lengths: int64 [B], slots of each row; None where nothing merged.
    """

    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenModelMixin(SemTokenRaggedMixin, SemTokenPreTrainedMixin):
    """The base model: the compression stage, then the family's layers."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.semantic_encoder = SemanticEncoder(config)
        self.learned_merger = LearnedMerger(config) if config.merge_mode == "learned" else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        compression: bool = False,
        target_ratio: float | None = None,
        span_ids: Tensor | None = None,
        protected_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        read_mask: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        states_to_keep: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The family's forward over every token, or with `compression=True` over the slots of `compress`.

        Args:
            compression: True merges the tokens that `read_mask` and the protections leave free.
            target_ratio, span_ids, protected_mask, query_mask, read_mask: as in `compress`.
            prefill_chunk_size: run the layers over this many columns at a time, to bound the working memory.
            states_to_keep: the last columns that the caller reads; states of chunks before them are let go. 0: all.

        Returns:
            `last_hidden_state` [B, T, H] and no `span_ids` where nothing merged; else [B, M, H] over the slots. With
            `states_to_keep` and chunks, only the last columns of that.

        Raises:
            ValueError: an argument has the wrong shape or values.
        """
        if prefill_chunk_size is not None and (type(prefill_chunk_size) is not int or prefill_chunk_size < 1):
            raise ValueError(f"`prefill_chunk_size` must be an integer >= 1 or None, got {prefill_chunk_size!r}")
        _heed_mask_of_past(attention_mask, inputs_embeds if input_ids is None else input_ids, past_key_values)
        if compression and input_ids is not None:
            prompt = self.compress(
                input_ids,
                _mask_of_call(attention_mask, input_ids, past_key_values),
                span_ids,
                target_ratio,
                protected_mask,
                read_mask,
                position_ids,
                past_key_values=past_key_values,
                query_mask=query_mask,
                details=False,
            )
            if prompt.is_merged:
                return self._forward_slots(
                    prompt, past_key_values, use_cache, prefill_chunk_size, states_to_keep, **kwargs
                )
            log_prefill(prompt)
        adapted: Tensor | bool = False
        if (step := step_of_call(kwargs)) is not None and not step.is_plain:
            assert input_ids is not None
            assert position_ids is not None
            inputs_embeds, position_ids, adapted = step.read(self.get_input_embeddings(), input_ids, position_ids)
            input_ids = None
        name, columns = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
        if columns is None:
            raise ValueError("pass `input_ids` or `inputs_embeds`")
        if getattr(columns, "ndim", 0) < 2:
            raise ValueError(f"`{name}` must be a tensor [batch, tokens, ...], got {type(columns).__name__}")
        if tracks_slots(past_key_values):
            tokens, is_masked = columns[..., 0] if input_ids is None else columns, attention_mask is not None
            attention_mask, position_ids = _append_plain(
                past_key_values, tokens, attention_mask, position_ids, self.config.position_mode
            )
            if getattr(past_key_values, "ragged_rows", None) is not None:
                assert position_ids is not None
                counts, index = _counts_of_turn(past_key_values, tokens, is_masked)
                gate = self._rows_of_adapter(past_key_values)
                turn = name, columns, position_ids, past_key_values, counts, index
                return self._run_ragged(*turn, use_cache, prefill_chunk_size, states_to_keep, gate, **kwargs)
        has_gaps = tracks_slots(past_key_values) and past_key_values.is_compressed
        with adapter_acts_on(self._rows_of_adapter(past_key_values) if has_gaps else adapted):
            return self._run_layers(
                name,
                columns,
                attention_mask,
                position_ids,
                past_key_values,
                use_cache,
                prefill_chunk_size,
                states_to_keep,
                has_gaps,
                **kwargs,
            )

    def _forward_slots(
        self,
        prompt: CompressedPrompt,
        past_key_values: Any,
        use_cache: bool | None,
        chunk_size: int | None,
        states_to_keep: int,
        **kwargs: Any,
    ) -> SemTokenModelOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            past_key_values = SemTokenCache(config=self.config)
        window = getattr(self.config, "sliding_window", None)
        if window is not None and prompt.span_ids.shape[1] > window and self.config.position_mode == "original":
            logger.warning_once(
                f"`sliding_window` ({window}) counts slots, so that rotary distances grow beyond those of the plain "
                "model: use position_mode='compact' if the model was not trained on them."
            )
        # Without a cache and a mask, Transformers would read gapped positions as packed sequences.
        mask = prompt.attention_mask
        is_ragged = past_key_values is not None and self._makes_ragged(past_key_values, len(mask))
        if past_key_values is not None:
            tokens = prompt.span_ids.shape[1]
            past_key_values.record(prompt.slot_lengths, tokens, compressed=True, padded=prompt.is_padded)
            mask = past_key_values.attention_mask
        gate = self._rows_of_adapter(past_key_values, prompt)
        if is_ragged:
            counts, width = prompt.slot_counts, prompt.position_ids.shape[1]
            starts = [(row + 1) * width - count for row, count in enumerate(counts)]
            index = ranges(starts, counts, prompt.position_ids.device) if prompt.is_padded else None
            packed = "inputs_embeds", prompt.inputs_embeds, prompt.position_ids, past_key_values, counts, index
            outputs = self._run_ragged(*packed, use_cache, chunk_size, states_to_keep, gate, **kwargs)
        else:
            columns, positions = prompt.inputs_embeds, prompt.position_ids
            with adapter_acts_on(gate):
                turn = "inputs_embeds", columns, mask, positions, past_key_values
                outputs = self._run_layers(*turn, use_cache, chunk_size, states_to_keep, True, **kwargs)
        log_prefill(prompt, past_key_values)
        return SemTokenModelOutputWithPast(**outputs, span_ids=prompt.span_ids, compressed_lengths=prompt.kept_lengths)

    def _rows_of_adapter(self, cache: Any, prompt: CompressedPrompt | None = None) -> Tensor | None:
        """bool [B], rows with merged slots, on which an adapter acts; None where there is no adapter."""
        if self.config.adapter_subfolder is None:
            return None
        if cache is None and prompt is not None:
            return prompt.kept_lengths < prompt.original_lengths
        return cache.compressed_rows

    def _run_layers(
        self,
        name: str,
        columns: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        chunk_size: int | None,
        states_to_keep: int,
        has_gaps: bool,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The family's forward, in one go or `chunk_size` columns at a time; `has_gaps`: of the positions so far."""
        length = columns.shape[1]
        chunk_size = chunk_size if chunk_size and tracks_slots(past_key_values) else length
        before = past_key_values.physical_length() if tracks_slots(past_key_values) else 0
        states = []
        for start in range(0, max(length, 1), max(chunk_size, 1)):
            end = min(start + chunk_size, length)
            mask, positions = attention_mask, position_ids
            if length > chunk_size:
                mask = None if mask is None else mask[:, : before + end]
                positions = None if positions is None else positions[:, start:end]
            if has_gaps:
                kwargs |= flash_attention_kwargs(
                    self.config._attn_implementation, len(columns), end - start, before + end, columns.device
                )
            outputs = super().forward(
                **{name: columns[:, start:end]},
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **{**kwargs, "return_dict": True},
            )
            if not states_to_keep or end > length - states_to_keep:
                states.append(outputs.last_hidden_state)
        if len(states) > 1:
            outputs.last_hidden_state = torch.cat(states, dim=1)
        return outputs


def _mask_of_call(mask: Tensor | None, input_ids: Tensor, cache: Any) -> Tensor | None:
    """The part of a mask over all tokens so far that belongs to `input_ids`.

    Raises:
        ValueError: the mask covers neither these tokens nor all tokens so far.
    """
    if mask is None:
        return None
    tokens, held = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
    if mask.shape[1] not in (tokens, held + tokens):
        expected = (len(input_ids), held + tokens)
        raise ValueError(f"`attention_mask` must have the shape {expected}, got {tuple(mask.shape)}")
    return mask[:, -tokens:]


def _heed_mask_of_past(mask: Tensor | None, columns: Tensor | None, cache: Any) -> None:
    """Let a cache leave out what the mask of a new turn hides of earlier ones; single steps of decoding have no say."""
    if mask is None or columns is None or not tracks_slots(cache):
        return
    if getattr(mask, "ndim", 0) != 2 or columns.shape[1] == 1:
        return
    held = cache.get_seq_length()
    if held and mask.shape[1] == held + columns.shape[1]:
        cache.leave_out(mask[:, :held])


def _counts_of_turn(cache: Any, tokens: Tensor, is_masked: bool) -> tuple[list[int], Tensor | None]:
    """Columns of each row that are no padding, and where they lie; waits for the device if a turn has a mask."""
    rows, width = tokens.shape
    if not is_masked or width == 1:
        return [width] * rows, None
    real = cache.slot_lengths[:, -width:] > 0
    return real.sum(1).tolist(), real.flatten().nonzero().squeeze(1)


def _append_plain(
    cache: Any, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, position_mode: str
) -> tuple[Tensor | None, Tensor | None]:
    """Record tokens that are appended one slot each; returns the mask and positions that the layers need.

    As long as the cache holds nothing merged, both are what the caller gave, so that the family's own path is exact.

    Raises:
        ValueError: a prepared mask, over the original sequence, and a cache with merged slots.
    """
    is_prepared = attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2
    if is_prepared and cache.is_compressed:
        raise ValueError(
            "a prepared attention mask does not fit a cache with merged slots; pass a 2D mask over all tokens"
        )
    new = None if attention_mask is None or is_prepared else attention_mask[:, -tokens.shape[1] :]
    if tokens.shape[1] == 1 and getattr(cache, "ragged_rows", None) is not None:
        # The host has to know how long rows are: what a mask hides of single steps goes with the next turn.
        new = None
    slots = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device) if new is None else (new != 0).long()
    if cache.is_compressed and (position_mode == "compact" or position_ids is None):
        held = cache.compressed_lengths if position_mode == "compact" else cache.original_lengths
        position_ids = (held[:, None] + slots.cumsum(1) - 1).clamp(min=0)
    elif position_ids is None:
        # The family would count them from the cache, which knows of these tokens before its layers do.
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + cache.get_seq_length()
    cache.record(slots, tokens.shape[1], compressed=False, padded=new is not None)
    return (cache.attention_mask if cache.is_compressed else attention_mask), position_ids


__all__ = ["SemTokenModelMixin", "SemTokenModelOutputWithPast"]
