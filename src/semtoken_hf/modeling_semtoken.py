"""SemToken on any decoder of Transformers: what a family's base model inherits.

- It compresses before the first layer and hands the layers slots; the rest of the forward is the family's.
- Where nothing merges, the call goes to the family's own forward unchanged (law 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .adapter_semtoken import adapter_acts_on
from .cache_semtoken import (
    SemTokenCache,
    Turn,
    append_plain,
    apply_past_mask,
    check_chunk_size,
    counts_of_turn,
    is_semtoken_cache,
    is_static_cache,
)
from .compression import CompressedPrompt, log_prefill
from .logging_semtoken import get_logger
from .pretrained_semtoken import PlainTuple, SemTokenPreTrainedMixin, packing_argument, slot_step_of
from .read_positions import READING, reads_of, token_states
from .semantic_encoder import SemanticEncoder
from .span_merging import LearnedMerger
from .varlen_semtoken import SemTokenRaggedMixin, ranges

logger = get_logger(__name__)


@dataclass
class SemTokenModelOutputWithPast(PlainTuple, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, over slots where tokens merged; as a tuple, exactly that.

    Args:
        span_ids: int64 [B, T], slot of every token, -1 for padding; None where nothing merged.
        compressed_lengths: int64 [B], slots of each row; None where nothing merged.
    """

    cross_attentions: Any = None  # of GPT-2, whose head looks for it
    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenModelMixin(SemTokenRaggedMixin, SemTokenPreTrainedMixin):
    """The base model: the compression stage, then the family's layers.

    Attributes:
        heads: classes of the family's heads.
        has_head: whether it is part of a language model, whose users expect states of tokens.
        reads_every_token: set by a head for which nothing may merge.
    """

    heads: tuple[Any, ...] = ()
    has_head = False
    reads_every_token = False

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
        compression: bool | None = None,
        target_ratio: float | None = None,
        span_ids: Tensor | None = None,
        protected_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_weight: float | None = None,
        read_mask: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        slot_reading: Any = None,
        head_reads: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SemTokenModelOutputWithPast:
        """The family's forward, over the slots of `compress` where tokens may merge.

        Where the forward of a language model was replaced, or its base model is called by itself, the states stay those
        of tokens: what `labels` or `logits_to_keep` read is whole, and the rest is zero.

        Args:
            compression: False is exactly the plain model; None takes the configuration's.
            target_ratio, span_ids, protected_mask, query_mask, query_weight, read_mask: as in `compress`.
            prefill_chunk_size: run the layers over this many columns at a time, to bound the working memory.
            slot_reading: what the head reads of a prompt that it has compressed (see `read_positions.py`).
            head_reads: what another head reads (see `read_positions.py`).

        Returns:
            `last_hidden_state` [B, T, H] and no `span_ids` where nothing merged; else [B, M, H] over the slots, what
            `slot_reading` makes of them, or [B, T, H] for `head_reads`.

        Raises:
            ValueError: an argument has the wrong shape or values.
        """
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        layers: dict[str, Any] = {**kwargs, "use_cache": use_cache, "chunk_size": prefill_chunk_size}
        for name in READING:  # of the head
            layers.pop(name, None)
        if slot_reading is not None:
            outputs = self._forward_slots(slot_reading.prompt, past_key_values, slot_reading.last_columns, **layers)
            outputs.last_hidden_state = slot_reading.states(outputs.last_hidden_state)
            return outputs
        check_chunk_size(prefill_chunk_size)
        apply_past_mask(attention_mask, inputs_embeds if input_ids is None else input_ids, past_key_values)
        planning: dict[str, Any] = {"target_ratio": target_ratio, "query_weight": query_weight}
        planning |= {"span_ids": span_ids, "protected_mask": protected_mask, "query_mask": query_mask}
        if head_reads is None and self.has_head and compression is None and read_mask is None:
            head_reads = reads_of(kwargs)
        prompt, wanted = None, self._wants_compression(compression, target_ratio, query_weight)
        if wanted and self.reads_every_token:
            wanted = False
            if compression or target_ratio is not None or span_ids is not None:
                self._warn_uncompressed("its head reads every token; leave `compression` and `target_ratio` out")
        if wanted:
            if head_reads is not None:
                read_mask = self._read_mask(call, head_reads)
            if self._is_compressible(call) if head_reads is None else read_mask is not None:
                prompt = self._compress_call(call, read_mask=read_mask, **planning)
        if prompt is not None and prompt.is_merged:
            outputs = self._forward_slots(prompt, past_key_values, 0, **layers)
            if head_reads is not None and read_mask is not None:
                assert outputs.last_hidden_state is not None
                outputs.last_hidden_state = token_states(outputs.last_hidden_state, prompt, read_mask)
            return outputs
        outputs = self._forward_tokens(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **layers
        )
        if prompt is not None:
            log_prefill(prompt, outputs.past_key_values)
        return outputs

    def _forward_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        chunk_size: int | None,
        **kwargs: Any,
    ) -> SemTokenModelOutputWithPast:
        """The family's forward over every token, behind slots where the cache holds some."""
        adapted: Tensor | bool = False
        step = slot_step_of(kwargs)
        if step is not None and not step.is_plain:
            assert input_ids is not None
            assert position_ids is not None
            inputs_embeds, position_ids, adapted = step.read(self.get_input_embeddings(), input_ids, position_ids)
            input_ids = None
        name, columns = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
        if columns is None:
            raise ValueError("pass `input_ids` or `inputs_embeds`")
        if getattr(columns, "ndim", 0) < 2:
            raise ValueError(f"`{name}` must be a tensor [batch, tokens, ...], got {type(columns).__name__}")
        turn = Turn(name, columns, position_ids, past_key_values, attention_mask, adapted)
        if is_semtoken_cache(past_key_values):
            if past_key_values.is_compressed and (packing := packing_argument(kwargs)) is not None:
                raise ValueError(
                    f"`{packing}` counts no merged slots, but the cache holds some; pass one sequence a row"
                )
            self._append(turn, columns[..., 0] if input_ids is None else columns)
        elif is_static_cache(past_key_values):
            turn.attention_mask = past_key_values.mask_of_columns(attention_mask, columns.shape[1])
            turn.position_ids = past_key_values.positions_of(position_ids, columns.shape[1])
            turn.adapted = self._rows_of_adapter(past_key_values) if past_key_values.is_compressed else False
        return SemTokenModelOutputWithPast.of(self._run(turn, 0, use_cache, chunk_size, **kwargs))

    def _append(self, turn: Turn, tokens: Tensor) -> None:
        """Record a turn of plain `tokens` [B, Q] in its cache, and find out what its layers need for it."""
        cache, is_masked = turn.cache, turn.attention_mask is not None
        turn.attention_mask, turn.position_ids = append_plain(
            cache, tokens, turn.attention_mask, turn.position_ids, self.config.position_mode
        )
        turn.has_gaps = cache.is_compressed
        if getattr(cache, "ragged_rows", None) is not None:
            turn.counts, turn.index = counts_of_turn(cache, tokens, is_masked)
        if turn.has_gaps or turn.counts is not None:
            turn.adapted = self._rows_of_adapter(cache)

    def _forward_slots(
        self,
        prompt: CompressedPrompt,
        past_key_values: Any,
        last_columns: int,
        use_cache: bool | None,
        chunk_size: int | None,
        **kwargs: Any,
    ) -> SemTokenModelOutputWithPast:
        """The family's forward over slots; states of chunks before the `last_columns` are freed, unless that is 0."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            past_key_values = SemTokenCache(config=self.config)
        window = getattr(self.config, "sliding_window", None)
        if window is not None and prompt.span_ids.shape[1] > window and self.config.position_mode == "original":
            logger.warning_once(
                f"`sliding_window` ({window}) counts slots, so that rotary distances grow beyond those of the plain "
                "model: use position_mode='compact' if the model was not trained on them."
            )
        _warn_of_length(self.config, prompt, past_key_values)
        turn = Turn("inputs_embeds", prompt.inputs_embeds, prompt.position_ids, past_key_values, prompt.attention_mask)
        turn.has_gaps = True
        is_ragged = past_key_values is not None and self._makes_ragged(past_key_values, len(prompt.span_ids))
        if past_key_values is not None:
            tokens = prompt.span_ids.shape[1]
            past_key_values.record(prompt.slot_lengths, tokens, compressed=True, padded=prompt.is_padded)
            turn.attention_mask = past_key_values.attention_mask
        turn.adapted = self._rows_of_adapter(past_key_values, prompt)
        if is_ragged:
            turn.counts, width = prompt.slot_counts, prompt.position_ids.shape[1]
            starts = [(row + 1) * width - count for row, count in enumerate(turn.counts)]
            turn.index = ranges(starts, turn.counts, prompt.position_ids.device) if prompt.is_padded else None
        outputs = self._run(turn, last_columns, use_cache, chunk_size, **kwargs)
        log_prefill(prompt, past_key_values)
        return SemTokenModelOutputWithPast.of(outputs, prompt)

    def _rows_of_adapter(self, cache: Any, prompt: CompressedPrompt | None = None) -> Tensor | None:
        """bool [B], rows with merged slots, on which an adapter acts; None where there is no adapter."""
        if self.config.adapter_subfolder is None:
            return None
        if cache is None and prompt is not None:
            return prompt.kept_lengths < prompt.original_lengths
        return cache.compressed_rows

    def _run(self, turn: Turn, last_columns: int, use_cache: bool | None, chunk_size: int | None, **kwargs: Any) -> Any:
        """The family's forward over a turn, padded or ragged; states before the `last_columns` are freed, unless 0."""
        if turn.counts is not None:
            return self._run_ragged(turn, last_columns, use_cache, chunk_size, **kwargs)
        if self.config.adapter_subfolder is None:
            return self._run_layers(turn, last_columns, use_cache, chunk_size, **kwargs)
        with adapter_acts_on(turn.adapted):
            return self._run_layers(turn, last_columns, use_cache, chunk_size, **kwargs)

    def _run_layers(
        self, turn: Turn, last_columns: int, use_cache: bool | None, chunk_size: int | None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """The family's forward, in one go or `chunk_size` columns at a time."""
        columns, length = turn.columns, turn.columns.shape[1]
        chunk_size = chunk_size if chunk_size and is_semtoken_cache(turn.cache) else length
        before = turn.cache.physical_length() if is_semtoken_cache(turn.cache) else 0
        states = []
        for start in range(0, max(length, 1), max(chunk_size, 1)):
            end = min(start + chunk_size, length)
            mask, positions = turn.attention_mask, turn.position_ids
            if length > chunk_size:
                mask = None if mask is None else mask[:, : before + end]
                positions = None if positions is None else positions[:, start:end]
            if turn.has_gaps:
                # Without a cache and a mask, Transformers would read gapped positions as packed sequences.
                kwargs |= flash_attention_kwargs(
                    self.config._attn_implementation, len(columns), end - start, before + end, columns.device
                )
            outputs = super().forward(
                **{turn.name: columns[:, start:end]},
                attention_mask=mask,
                position_ids=positions,
                past_key_values=turn.cache,
                use_cache=use_cache,
                **{**kwargs, "return_dict": True},
            )
            if not last_columns or end > length - last_columns:
                states.append(outputs.last_hidden_state)
        if len(states) > 1:
            outputs.last_hidden_state = torch.cat(states, dim=1)
        return outputs


def flash_attention_kwargs(
    attn_implementation: str | None, batch_size: int, query_length: int, key_length: int, device: torch.device
) -> dict[str, Any]:
    """Variable-length arguments that keep FlashAttention from reading gapped positions as packed sequences.

    Transformers infers packing from `position_ids` when the batch is 1 and no mask is left; explicit cumulative
    lengths take priority. Empty for other backends: SDPA and eager would ignore them.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [2]), `max_length_q`, `max_length_k` (int), or nothing.
    """
    if batch_size != 1 or not (attn_implementation or "").startswith(("flash_attention", "kernels-community/")):
        return {}

    def cumulative(length: int) -> Tensor:
        # Made on the device: a copy of a list would wait for it, in every step.
        return torch.arange(2, dtype=torch.int32, device=device) * length

    return {
        "cu_seq_lens_q": cumulative(query_length),
        "cu_seq_lens_k": cumulative(key_length),
        "max_length_q": query_length,
        "max_length_k": key_length,
    }


def _warn_of_length(config: Any, prompt: CompressedPrompt, cache: Any) -> None:
    """Warn once where slots stand at positions that the model was not trained for, padding included."""
    limit = getattr(config, "max_position_embeddings", None)
    held, tokens = (0 if cache is None else cache.get_seq_length()), prompt.span_ids.shape[1]
    slots = max(prompt.slot_counts) + (0 if cache is None else cache.physical_length())
    compact = config.position_mode == "compact"
    if limit is None or (slots if compact else held + tokens) <= limit:
        return
    ratio = math.ceil(10 * (held + tokens) / limit) / 10
    found = f"{slots} slots" if compact else f"{held + tokens} tokens in original positions"
    logger.warning_once(
        f"{found} are more than the model's {limit} positions (`max_position_embeddings`): expect worse text. Of the "
        f"prompt, position_mode='compact' with target_ratio={ratio:g} fits; more leaves room to generate."
    )


__all__ = ["SemTokenModelMixin", "SemTokenModelOutputWithPast", "flash_attention_kwargs"]
