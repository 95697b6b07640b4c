"""SemToken on any decoder of Transformers: what a family's language-modelling head inherits.

- The head decides what may merge: everything but the positions whose logits or loss are asked for (law 2).
- Wherever compression does not apply, the call goes to the family's own forward unchanged (law 1), with one warning
  where the user may have expected otherwise (law 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .cache_semtoken import tracks_slots
from .configuration_semtoken import check_query_weight, check_ratio
from .generation_semtoken import SemTokenGenerationMixin
from .logging_semtoken import get_logger
from .paged_semtoken import SemTokenContinuousMixin, step_of_call
from .pretrained_semtoken import SemTokenPreTrainedMixin
from .read_positions import (
    IGNORED_LABEL,
    fit_to_call,
    kept_slot_states,
    kept_states,
    labelled_slot_states,
    read_mask_of,
    slot_columns,
)
from .span_planner import check_ids

logger = get_logger(__name__)


@dataclass
class SemTokenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`; `span_ids` and `compressed_lengths` as in `SemTokenModelOutputWithPast`."""

    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenForCausalLMMixin(SemTokenGenerationMixin, SemTokenContinuousMixin, SemTokenPreTrainedMixin):
    """The language-modelling head."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # Only for classes that are named there does `Trainer` shift the labels of its label smoothing.
        if "config_class" in cls.__dict__:
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(cls.config_class.model_type, cls.__name__)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        compression: bool | None = None,
        target_ratio: float | None = None,
        span_ids: Tensor | None = None,
        protected_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_weight: float | None = None,
        prefill_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The family's forward; tokens whose logits or loss nobody asks for may merge.

        Args:
            labels: int64 [B, T]; -100 is not scored. Logits that no label scores come back as NaN if anything merged.
            logits_to_keep: as in Transformers: the last k positions, or an index tensor; 0 asks for all.
            compression: False is exactly the plain model; None takes the configuration's.
            target_ratio: tokens per slot, >= 1, for this call.
            span_ids: int [B, T], a plan made beforehand, -1 for padding.
            protected_mask: [B, T], non-zero for tokens that stay whole.
            query_mask: [B, T], non-zero for the tokens of the question, which stay whole; None: the end of the last
                user turn of a chat.
            query_weight: how much the question decides what else stays whole, for this call.
            prefill_chunk_size: run the layers over this many slots at a time.

        Returns:
            logits of the family's shape, [B, T, V] or [B, k, V]. Where tokens merged, `hidden_states` and `attentions`
            are over slots, and with `prefill_chunk_size` over the last chunk.

        Raises:
            ValueError: a mask or `span_ids` has the wrong shape or values, or the ratio is below 1.
        """
        plain = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        if prefill_chunk_size is not None:
            plain["prefill_chunk_size"] = prefill_chunk_size
        if step_of_call(kwargs) is not None:  # its prompts were compressed when they were added
            return super().forward(**plain)
        columns = inputs_embeds if input_ids is None else input_ids
        length = None if columns is None or getattr(columns, "ndim", 0) < 2 else columns.shape[1]
        asks_for_all = labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 0
        # First, so that nonsense is refused whatever else the call asks for.
        if query_weight is not None:
            check_query_weight(query_weight)
        if not self._wants_compression(compression, target_ratio) or asks_for_all or self._is_short(length):
            return super().forward(**plain)
        if (reason := _why_not(input_ids, attention_mask, position_ids, past_key_values, kwargs)) is not None:
            self._warn_uncompressed(reason)
            return super().forward(**plain)
        assert input_ids is not None
        check_ids(input_ids)
        read = read_mask_of(input_ids, labels, logits_to_keep)
        if read is None:
            return super().forward(**plain)
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        tokens, drafted = input_ids.shape[1], max(logits_to_keep - 1, 0) if isinstance(logits_to_keep, int) else 0
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            compression=True,
            target_ratio=target_ratio,
            query_weight=query_weight,
            span_ids=fit_to_call(span_ids, "span_ids", start, tokens, drafted),
            protected_mask=fit_to_call(protected_mask, "protected_mask", start, tokens, drafted),
            query_mask=fit_to_call(query_mask, "query_mask", start, tokens, drafted),
            read_mask=read,
            prefill_chunk_size=prefill_chunk_size,
            # Every token that is read has a slot of its own, at the end as in the row.
            states_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **{**kwargs, "return_dict": True},
        )
        return self._head(outputs, labels, logits_to_keep, **kwargs)

    def _head(
        self, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> SemTokenCausalLMOutputWithPast:
        """Logits and loss at the positions that are read."""
        states, span_ids, loss = outputs.last_hidden_state, outputs.get("span_ids"), None
        vocab_size, head = self.config.vocab_size, self.get_output_embeddings()
        by_labels = labels if isinstance(logits_to_keep, int) and logits_to_keep == 0 else None
        columns = None
        if span_ids is not None:
            # The last layer may live on another device than the tokens.
            columns = slot_columns(span_ids, outputs.compressed_lengths, states.shape[1]).to(states.device)
        if columns is not None and by_labels is not None:
            states, targets, index = labelled_slot_states(states, columns, by_labels.to(states.device))
            scored = head(states)
            # A tied head may live with the embeddings, away from the last layer.
            targets, index = targets.to(scored.device), index.to(scored.device)
            loss = self.loss_function(
                logits=scored[None], labels=None, shift_labels=targets[None], vocab_size=vocab_size, **kwargs
            )
            logits = scored.new_full((by_labels.numel(), scored.shape[-1]), torch.nan)
            # Padding in front of a labelled token predicts nothing.
            scored = scored.masked_fill((targets == IGNORED_LABEL)[:, None], torch.nan)
            logits = logits.index_copy(0, index, scored).unflatten(0, by_labels.shape)
        else:
            if columns is None:
                logits = head(kept_states(states, logits_to_keep))
            else:
                states, is_padding = kept_slot_states(states, columns, logits_to_keep)
                logits = head(states)
                logits = logits.masked_fill(is_padding[..., None].to(logits.device), torch.nan)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return SemTokenCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            span_ids=span_ids,
            compressed_lengths=outputs.get("compressed_lengths"),
        )

    def _wants_compression(self, compression: bool | None, target_ratio: float | None) -> bool:
        if target_ratio is not None:
            check_ratio(target_ratio)
        if not isinstance(compression, bool | type(None)):
            raise ValueError(f"`compression` must be True or False, got {compression!r}")
        wanted = self.config.compression if compression is None else compression
        ratio = self.config.target_ratio if target_ratio is None else target_ratio
        return bool(wanted) and not (ratio == 1 and self.config.max_kept_tokens is None)

    def _is_short(self, length: int | None) -> bool:
        return length is not None and length < max(2, self.config.min_prompt_length)

    def _warn_uncompressed(self, reason: str) -> None:
        logger.warning_once(f"SemToken does not compress this call and runs the plain model exactly: {reason}")


def _why_not(
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call cannot be compressed, or None."""
    if input_ids is None:
        return "`inputs_embeds` has no token ids to plan with; pass `input_ids`"
    if "cache" in kwargs or "block_table" in kwargs:
        return (
            "paged attention manages its own cache; use `generate_batch` or the manager of `init_continuous_batching`"
        )
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        return "a prepared attention mask cannot be shortened; pass a 2D mask"
    if cache is not None and not tracks_slots(cache):
        return f"{type(cache).__name__} cannot hold merged slots; pass a SemTokenCache or leave `past_key_values` out"
    if kwargs.get("shift_labels") is not None:
        return "`shift_labels` is not supported; pass `labels`"
    if isinstance(position_ids, Tensor) and attention_mask is None and bool((position_ids.diff(dim=-1) <= 0).any()):
        return "`position_ids` that restart mean packed sequences; pass one sequence a row"
    return None


__all__ = ["SemTokenCausalLMOutputWithPast", "SemTokenForCausalLMMixin"]
