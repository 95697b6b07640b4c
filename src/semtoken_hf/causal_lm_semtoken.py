"""SemToken on any decoder of Transformers: what a family's language-modelling head inherits.

- The head decides what may merge: everything but the positions whose logits or loss are asked for (law 2).
- The logits are the family's own: its forward runs, its base model reads slots, and hands the head the states of the
  positions that are read.
- Wherever compression does not apply, the family's forward runs unchanged (law 1), with one warning where the user may
  have expected otherwise (law 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_semtoken import apply_past_mask, check_chunk_size, is_prefix
from .compression import CompressedPrompt, log_prefill
from .generation_semtoken import SemTokenGenerationMixin
from .prefix_semtoken import SemTokenPrefixMixin
from .pretrained_semtoken import PlainTuple, SemTokenHeadMixin, slot_step_of
from .read_positions import KeptPositions, LabelledPositions, align_to_step, reads_of, telling_base


@dataclass
class SemTokenCausalLMOutputWithPast(PlainTuple, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`; as a tuple, exactly that.

    Args:
        span_ids: int64 [B, T], slot of every token, -1 for padding; None where nothing merged.
        compressed_lengths: int64 [B], slots of each row; None where nothing merged.
    """

    cross_attentions: Any = None
    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenForCausalLMMixin(SemTokenGenerationMixin, SemTokenPrefixMixin, SemTokenHeadMixin):
    """The language-modelling head."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.base_model.has_head = True

    def __setattr__(self, name: str, value: Any) -> None:
        # `model.forward = ...` is how trainers bring a head of their own, and PEFT calls nothing else.
        super().__setattr__(name, telling_base(self, value) if name == "forward" else value)

    def _get_name(self) -> str:
        # `Trainer` shifts the labels of its label smoothing for the language models that it knows by name.
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("transformers.models."))

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
    ) -> SemTokenCausalLMOutputWithPast:
        """The family's forward; tokens whose logits or loss nobody asks for may merge.

        Args:
            labels: int64 [B, T]; -100 is not scored. Logits that no label scores come back as NaN if anything merged.
            logits_to_keep: as in Transformers: the last k positions, or an index tensor; 0 asks for all. Padding among
                them has finite logits without a meaning.
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
        kwargs.pop("head_reads", None)  # somebody has only wrapped this forward
        if is_prefix(past_key_values):
            past_key_values = past_key_values.cache()
        call: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
            "return_dict": True,
        }
        if prefill_chunk_size is not None:
            call["prefill_chunk_size"] = prefill_chunk_size
        keeps_all, prompt = isinstance(logits_to_keep, int) and logits_to_keep == 0, None
        wanted = self._wants_compression(compression, target_ratio, query_weight)
        if wanted and keeps_all and labels is None:
            self._warn_if_filled_plain(call)
        if wanted and slot_step_of(kwargs) is None:
            options = {"target_ratio": target_ratio, "query_weight": query_weight}
            given = {"span_ids": span_ids, "protected_mask": protected_mask, "query_mask": query_mask}
            prompt = self._compress_unread(call, options, given)
        if prompt is None or not prompt.is_merged:
            outputs = SemTokenCausalLMOutputWithPast.of(super().forward(**call, compression=False))
            if prompt is not None:
                log_prefill(prompt, outputs.past_key_values)
            return outputs
        if labels is None or not keeps_all:
            kept = KeptPositions(prompt, logits_to_keep)
            return SemTokenCausalLMOutputWithPast.of(super().forward(**call, slot_reading=kept), prompt)
        scored = LabelledPositions(prompt, labels)
        call["shift_labels"] = scored.targets
        outputs = SemTokenCausalLMOutputWithPast.of(super().forward(**call, slot_reading=scored), prompt)
        assert outputs.logits is not None
        outputs.logits = scored.lay_out(outputs.logits)
        return outputs

    def _compress_unread(
        self, call: dict[str, Any], options: dict[str, Any], given: dict[str, Any]
    ) -> CompressedPrompt | None:
        """The prompt of a call as slots, those that nobody reads merged; None where every position is read.

        Args:
            call: arguments of `forward`.
            options: the ratio and the weight of the question.
            given: masks and plan of the prompt, which `generate` passes to every call.
        """
        if getattr(call["input_ids"], "shape", (0, 0))[1:] == (1,):  # a step of decoding
            return None
        read = self._read_mask(call, reads_of(call))
        if read is None:
            return None
        ids, cache, kept = call["input_ids"], call["past_key_values"], call["logits_to_keep"]
        check_chunk_size(call.get("prefill_chunk_size"))
        apply_past_mask(call["attention_mask"], ids, cache)
        start = cache.get_seq_length() if cache is not None else 0
        drafted = max(kept - 1, 0) if isinstance(kept, int) else 0
        given = {name: align_to_step(values, name, start, ids.shape[1], drafted) for name, values in given.items()}
        return self._compress_call(call, read_mask=read, **options, **given)


__all__ = ["SemTokenCausalLMOutputWithPast", "SemTokenForCausalLMMixin"]
