"""What `generate` does differently over a SemToken cache; the rest is Transformers'.

- The cache that `generate` made becomes one that tracks slots; where that is impossible, the plain model runs.
- A prompt that is expanded for beams or several returns is planned and read once; its slots are then repeated.
- With `cache_implementation="static"` the prompt is read over a dynamic cache; its slots then move into static layers.
- With `recompress_every`, generated text is read again, as a turn of its own, into merged slots.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, QuantizedCache, StaticCache
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.masking_utils import create_masks_for_generate

from .cache_semtoken import (
    SemTokenCache,
    begin_behind_prefix,
    check_chunk_size,
    is_prefix,
    is_quantized,
    is_semtoken_cache,
    is_static_cache,
)
from .configuration_semtoken import validate_compression_fields
from .logging_semtoken import get_logger
from .pretrained_semtoken import PAGED
from .static_cache_semtoken import SemTokenStaticCache

logger = get_logger(__name__)

# What `forward` takes beyond the plain model: what a generation configuration may hold, too, and what belongs to one
# prompt.
GENERATION_FIELDS = ("compression", "target_ratio", "query_weight")
PROMPT_ARGUMENTS = ("span_ids", "protected_mask", "query_mask")
OWN_ARGUMENTS = (*GENERATION_FIELDS, *PROMPT_ARGUMENTS, "prefill_chunk_size")


@dataclass
class GeneratedText:
    """What `recompress_every` may read again.

    Attributes:
        start: tokens of the original sequence before it, padding included.
        filler: id that fills up finished rows, or None.
    """

    start: int
    filler: int | None = None


class SemTokenGenerationMixin:
    """The hooks of `generate`."""

    # What `SemTokenForCausalLMMixin` and the family's classes bring.
    config: Any
    generation_config: Any
    _wants_compression: Any
    _warn_uncompressed: Any
    _is_short: Any
    __call__: Any

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any):
        # Its hidden states and attentions of the prompt are over slots.
        outputs = super().generate(*args, **kwargs)
        span_ids = getattr(getattr(outputs, "past_key_values", None), "prompt_span_ids", None)
        if span_ids is not None:
            outputs["span_ids"] = span_ids
        return outputs

    def adjust_generation_fn(self, *args: Any, trust_remote_code: Any = None, **kwargs: Any) -> None:
        """As in Transformers, but a checkpoint's `custom_generate/generate.py` never replaces `generate` unasked."""
        super().adjust_generation_fn(*args, trust_remote_code=False, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs: Any):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_chunk_size(generation_config.prefill_chunk_size)
        # A client of a server can set nothing else, and Transformers would keep these from `forward`.
        for name in GENERATION_FIELDS:
            value = getattr(generation_config, name, None)
            if value is not None and model_kwargs.get(name) is None:
                model_kwargs[name] = value
        prefix = model_kwargs.get("past_key_values")
        if is_prefix(prefix):
            if prefix.model is not self:
                raise ValueError("the prefix is of another model: `save` it, and `load_prefix` it with this one")
            model_kwargs["past_key_values"] = prefix.cache()
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        mask, longest = model_kwargs.get("attention_mask"), getattr(self, "_previous_max_cache_length", -1)
        # A mask of ones is gone by now.
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[-1]
        is_short = self._is_short(length)
        wanted = self._wants_compression(model_kwargs.get("compression"), model_kwargs.get("target_ratio"))
        given = generation_config
        if wanted and not is_short and generation_config.prefill_chunk_size is not None:
            # Else a static cache as long as the prompt would take its memory at once.
            given = copy.copy(generation_config)
            given.prefill_chunk_size = None
        result = super()._prepare_cache_for_generation(given, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if is_static_cache(cache):
            cache.check_room(generation_config.max_length - 1)
        if not wanted:
            return result
        if mask is not None and mask.ndim == 2 and bool((mask[:, -1] == 0).any()):
            if not is_short:
                self._warn_uncompressed("the prompts are padded on the right; use `padding_side='left'` to generate")
            model_kwargs["compression"] = False
            return result
        if not is_semtoken_cache(cache) and not getattr(cache, "_is_user_defined", False):
            if type(cache) in (DynamicCache, QuantizedCache):
                cache = model_kwargs["past_key_values"] = SemTokenCache.from_cache(cache)
            elif self._fills_static_cache(cache, model_kwargs) and not is_short:
                # It holds no memory and stands in for the one that `_prefill` makes, whose length is that of the slots.
                self._previous_max_cache_length = longest
            elif type(cache) is not StaticCache or model_kwargs.get("inputs_embeds") is None:
                kind = "generate(use_cache=False)" if cache is None else f"a {type(cache).__name__}"
                if type(cache) is StaticCache:
                    kind += f" that is offloaded or read by `{self.config._attn_implementation}` attention"
                if not is_short:
                    self._warn_uncompressed(f"{kind} cannot hold merged slots; use the default cache")
                model_kwargs["compression"] = False
        if is_semtoken_cache(cache) and self.config.recompress_every is not None:
            # Mostly set on a loaded model, and too small a number would never merge anything.
            validate_compression_fields(self.config)
            # Layers with a sliding window forget what a crop would have to bring back.
            cache.activate_past_recording()
        return result

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """As in Transformers; prompts are compressed in `add_request`, by the thread that calls it.

        `add_request` also takes `compression`, `target_ratio`, `query_weight` and, as sequences over the prompt,
        `span_ids`, `protected_mask` and `query_mask`. Lengths, limits and blocks of the scheduler count slots; results
        hold the original prompt. CUDA graphs and compiled forwards run every step but those that read slots.

        A checkpoint without the package runs the plain model, with a warning.
        """
        manager = None
        if getattr(self, "_cached_continuous_batching_manager", None) is None:
            try:
                # By name: a plain import would be a need of every checkpoint's remote code.
                batching = import_module("semtoken_hf.serving.continuous_batching")
                manager = batching.init_continuous_batching(self, *args, **kwargs)
            except ImportError:
                self._warn_uncompressed(PAGED)
        return super().init_continuous_batching(*args, **kwargs) if manager is None else manager

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        *args: Any,
        compression: bool | None = None,
        target_ratio: float | None = None,
        query_weight: float | None = None,
        **kwargs: Any,
    ):
        """As in Transformers, over slots.

        Args:
            inputs: token ids of each prompt.
            generation_config: as in Transformers.
            compression, target_ratio, query_weight: as in `forward`, for all prompts.

        Raises:
            ValueError: the ratio is below 1, or there is an argument that belongs to a single prompt.
        """
        self._wants_compression(compression, target_ratio, query_weight)
        if given := [name for name in PROMPT_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate_batch` has no place for {given}: pass them to `add_request` of the manager from "
                "`init_continuous_batching()`"
            )
        # Transformers hands on no other options to the manager.
        config = copy.copy(self.generation_config if generation_config is None else generation_config)
        options = {"compression": compression, "target_ratio": target_ratio, "query_weight": query_weight}
        for name, value in options.items():
            if value is not None:
                setattr(config, name, value)
        return super().generate_batch(inputs, config, *args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any):
        model_kwargs, input_ids = kwargs["model_kwargs"], kwargs["input_ids"]
        cache = model_kwargs.get("past_key_values")
        if is_semtoken_cache(cache):
            if _holds_new_tokens_alone(input_ids, model_kwargs, kwargs["generation_config"]):
                raise ValueError(
                    f"drafts need the whole sequence: `input_ids` hold {input_ids.shape[1]} tokens behind "
                    f"{cache.get_seq_length()} in the cache; pass those, too"
                )
            begin_behind_prefix(input_ids, cache)
            cache.generated = GeneratedText(input_ids.shape[1])
        # Transformers hands our arguments on to the assistant, which refuses them if it is a plain model.
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not hasattr(assistant, "compress"):
            kwargs["model_kwargs"] = {k: v for k, v in model_kwargs.items() if k not in OWN_ARGUMENTS}
        return super()._get_candidate_generator(*args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any):
        processors = super()._get_logits_processor(*args, **kwargs)
        model_kwargs = kwargs.get("model_kwargs") or {}
        own = {name: model_kwargs[name] for name in GENERATION_FIELDS if name in model_kwargs}
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                # It would ask for the logits of the whole negative prompt, and read the last.
                processor.model = functools.partial(self.__call__, logits_to_keep=1, **own)
        return processors

    def _prefill(self, input_ids, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        cache = model_kwargs.get("past_key_values")
        model_kwargs, is_static = dict(model_kwargs), self._fills_static_cache(cache, model_kwargs)
        if is_static:
            cache = model_kwargs["past_key_values"] = SemTokenCache(config=self.config)
        if not is_semtoken_cache(cache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if not _holds_new_tokens_alone(input_ids, model_kwargs, generation_config):
            begin_behind_prefix(input_ids, cache)
        if cache.slot_lengths is not None and len(input_ids) > len(cache.slot_lengths) == 1:
            # Several questions, beams or returns behind one text.
            cache.batch_repeat_interleave(len(input_ids))
        if generation_config.prefill_chunk_size is not None:
            # Chunks of tokens would be planned one by one and cut at places that depend on padding: plan the whole
            # prompt, then run the layers over chunks of slots.
            model_kwargs["prefill_chunk_size"] = generation_config.prefill_chunk_size
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if not self._reads_copies_once(input_ids, cache, copies, model_kwargs):
            outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        else:
            rows = len(input_ids)
            for name, value in model_kwargs.items():
                if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                    model_kwargs[name] = value[::copies]
            outputs = super()._prefill(input_ids[::copies], generation_config, model_kwargs, *args, **kwargs)
            cache.batch_repeat_interleave(copies)
            for name, value in list(outputs.items()):
                if name != "past_key_values":
                    outputs[name] = _repeat_rows(value, copies)
        cache.prompt_span_ids = outputs.get("span_ids")
        if is_static:
            outputs["past_key_values"] = self._make_static(cache, generation_config)
        elif self.config.recompress_every is not None:
            filler = getattr(generation_config, "_pad_token_tensor", None)
            cache.generated = GeneratedText(cache.get_seq_length(), None if filler is None else int(filler))
        return outputs

    def _fills_static_cache(self, cache: Any, model_kwargs: dict[str, Any]) -> bool:
        """Whether `cache` is an empty static one of `generate` that gives way to one of slots."""
        if type(cache) is not StaticCache or getattr(cache, "_is_user_defined", False) or cache.offloading:
            return False
        # Others read fixed columns in ways of their own, or pack rows.
        if self.config._attn_implementation not in ("eager", "sdpa") or model_kwargs.get("inputs_embeds") is not None:
            return False
        return self._wants_compression(model_kwargs.get("compression"), model_kwargs.get("target_ratio"))

    def _make_static(self, cache: SemTokenCache, generation_config: Any) -> SemTokenStaticCache:
        """The slots of a prompt in static layers, no shorter than those before, so that compiled steps fit again."""
        if self.config.recompress_every is not None:
            logger.warning_once("`recompress_every` has no effect with a static cache, which cannot be cropped")
        room = max(generation_config.max_length - 1 - cache.get_seq_length(), 0)
        wanted, longest = generation_config.max_cache_len or 0, getattr(self, "_previous_max_cache_length", 0)
        self._previous_max_cache_length = max(cache.physical_length() + room, wanted, longest)
        return SemTokenStaticCache(self.config, cache, self._previous_max_cache_length)

    def create_masks_for_generate(
        self, *, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **kwargs: Any
    ):
        """As in Transformers, which makes the masks of a static cache before a compiled step; over columns."""
        if is_static_cache(past_key_values):
            attention_mask = past_key_values.mask_of_columns(attention_mask, inputs_embeds.shape[1])
        call = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return getattr(super(), "create_masks_for_generate", create_masks_for_generate)(**call, **kwargs)

    def _reads_copies_once(self, input_ids: Tensor, cache: Any, copies: int, model_kwargs: dict[str, Any]) -> bool:
        wanted = self._wants_compression(model_kwargs.get("compression"), model_kwargs.get("target_ratio"))
        if not wanted or copies == 1 or cache.get_seq_length() or is_quantized(cache):
            return False
        # A short prompt stays plain to the last bit, which another batch size may change.
        return not self._is_short(input_ids.shape[1])

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # named, since Transformers looks for it
        **kwargs: Any,
    ):
        """As in Transformers; with `recompress_every`, now and then the call reads generated tokens again."""
        if next_sequence_length is None and kwargs.get("is_first_iteration"):
            next_sequence_length = _unread_with_drafts(input_ids, past_key_values)
        again, drafted = 0, (next_sequence_length or 1) - 1
        if next_sequence_length is not None and not kwargs.get("is_first_iteration"):
            again = self._count_to_read_again(past_key_values, kwargs)
        if again:
            length, recent_window = again + 1, self.config.recent_window
            text, ratio = past_key_values.generated, kwargs.get("target_ratio") or self.config.target_ratio
            past_key_values.crop(-again)
            text.start += length - recent_window
            next_sequence_length = length + drafted
            # They are the prompt's, even where it happens to be as long as what is read again.
            kwargs |= dict.fromkeys(PROMPT_ARGUMENTS)
            if ratio is not None:
                # The recent window comes on top, so that the cache grows at exactly 1 / ratio.
                kwargs["target_ratio"] = length / (math.ceil((length - recent_window) / ratio - 1e-9) + recent_window)
            if text.filler is not None and len(input_ids) > 1 and not drafted:
                attention_mask = _mask_filler(input_ids, attention_mask, next_sequence_length, text.filler)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _count_to_read_again(self, cache: Any, kwargs: dict[str, Any]) -> int:
        """Generated tokens in the cache, if it is time to merge them; else 0."""
        every = self.config.recompress_every
        if every is None or not is_semtoken_cache(cache) or cache.generated is None:
            return 0
        if not self._wants_compression(kwargs.get("compression"), kwargs.get("target_ratio")):
            return 0
        count = cache.get_seq_length() - cache.generated.start
        if count < every + self.config.recent_window - 1:
            return 0
        if is_quantized(cache):
            logger.warning_once("`recompress_every` has no effect with a quantised cache, which cannot be cropped")
            return 0
        return count


def _holds_new_tokens_alone(input_ids: Tensor, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Whether a caller passed the ids of a new turn alone, with a mask over all tokens."""
    mask = model_kwargs.get("attention_mask")
    # A mask of ones is gone by now.
    length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[-1]
    return length is not None and length > input_ids.shape[1]


def _unread_with_drafts(input_ids: Tensor, cache: Any) -> int | None:
    """How many of the ids a cache that came from outside does not hold yet, in the first step with drafts, where
    Transformers would read all of them again. None elsewhere."""
    generated = getattr(cache, "generated", None)
    held = 0 if generated is None else cache.get_seq_length()
    return input_ids.shape[1] - held if generated is not None and 0 < held < generated.start else None


def _repeat_rows(value: Any, copies: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(copies, dim=0)
    return type(value)(_repeat_rows(item, copies) for item in value) if isinstance(value, (tuple, list)) else value


def _mask_filler(input_ids: Tensor, attention_mask: Tensor | None, length: int, filler: int) -> Tensor | None:
    """The mask without what fills up finished rows among the last `length` tokens, but for the last, which is read."""
    tail = (input_ids[:, -length:] == filler).long()
    trailing = tail.flip(1).cumprod(1).flip(1)
    trailing[:, -1] = 0
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = attention_mask.clone()
    attention_mask[:, -length:] *= 1 - trailing
    return attention_mask


__all__ = ["OWN_ARGUMENTS", "SemTokenGenerationMixin"]
