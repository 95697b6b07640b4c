"""SemToken on any decoder of Transformers: what a family's base model and its language-modelling head inherit.

- The base model compresses before its first layer and hands the layers slots; the rest of its forward is the family's.
- The head decides what may merge: everything but the positions whose logits or loss are asked for (law 2).
- Wherever compression does not apply, the call goes to the family's own forward unchanged (law 1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .attention_semtoken import flash_attention_kwargs
from .cache_semtoken import SemTokenCache
from .compression import CompressedPrompt, compress_prompt
from .read_positions import kept_slot_states, kept_states, labelled_slot_states, read_mask_of
from .semantic_encoder import SemanticEncoder

logger = logging.get_logger(__name__)


def tracks_slots(cache: Any) -> bool:
    """Whether `cache` is a SemTokenCache; by its interface, since remote code may define the class a second time."""
    return hasattr(cache, "slot_lengths") and hasattr(cache, "record")


@dataclass
class SemTokenModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` over slots.

    Args:
        span_ids: int64 [B, T], slot of every token, -1 for padding; None where nothing merged.
        compressed_lengths: int64 [B], slots of each row; None where nothing merged.
    """

    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


@dataclass
class SemTokenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`; `span_ids` and `compressed_lengths` as in `SemTokenModelOutputWithPast`."""

    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenPreTrainedMixin:
    """Loading and saving: the encoder is part of the checkpoint, frozen and fp32."""

    _keep_in_fp32_modules_strict = ["semantic_encoder"]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """As in Transformers.

        Raises:
            ValueError: the checkpoint holds no encoder, as a plain one does.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = [key for key in info["missing_keys"] if "semantic_encoder." in key]
        if missing and model.config.segmentation_mode != "uniform":
            raise ValueError(
                f"the checkpoint holds no semantic encoder ({missing[0]} and {len(missing) - 1} more are missing): "
                "convert it first with `semtoken_hf.convert_checkpoint(model, encoder, output_dir)`"
            )
        for module in model.modules():
            if isinstance(module, SemanticEncoder):
                module.freeze()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any):
        """As in Transformers; the folder then serves AutoModel as well as AutoModelForCausalLM."""
        if self._auto_class is not None:
            base = type(self.base_model)
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**known, "AutoModel": f"{base.__module__.split('.')[-1]}.{base.__name__}"}
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """As in Transformers; new tokens get the encoder's mean state."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.base_model.semantic_encoder.resize(self.config.vocab_size)
        return embeddings

    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        span_ids: Tensor | None = None,
        target_ratio: float | None = None,
        protected_mask: Tensor | None = None,
        read_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        position_mode: str | None = None,
        past_key_values: Any = None,
    ) -> CompressedPrompt:
        """The compression stage alone.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding on any side.
            span_ids: int [B, T], a ready plan (see `SemTokenFastTokenizer`) instead of the model's own.
            target_ratio: tokens per slot, instead of the configuration's.
            protected_mask: [B, T], non-zero for tokens that stay whole.
            read_mask: bool [B, T], positions that will be read; None: the last token of each row.
            position_ids: int64 [B, T], positions of the tokens; None: counted along each row.
            position_mode: "original" or "compact", instead of the configuration's.
            past_key_values: a SemTokenCache that the slots will be appended to.

        Raises:
            ValueError: a mask or `span_ids` has the wrong shape or values, or the ratio is below 1.
        """
        model, offset = self.base_model, None
        mode = position_mode or self.config.position_mode
        if tracks_slots(past_key_values) and past_key_values.slot_lengths is not None:
            cache = past_key_values
            offset = cache.compressed_lengths if mode == "compact" else cache.original_lengths
        return compress_prompt(
            self.config,
            model.semantic_encoder,
            model.get_input_embeddings(),
            input_ids,
            position_ids=position_ids,
            position_offset=offset,
            position_mode=mode,
            attention_mask=attention_mask,
            read_mask=read_mask,
            protected_mask=protected_mask,
            span_ids=span_ids,
            target_ratio=target_ratio,
            opens_row=offset is None,
        )


class SemTokenModelMixin(SemTokenPreTrainedMixin):
    """The base model: the compression stage, then the family's layers."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.semantic_encoder = SemanticEncoder(config)
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
        read_mask: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The family's forward over every token, or with `compression=True` over the slots of `compress`.

        Args:
            compression: True merges the tokens that `read_mask` and the protections leave free.
            target_ratio, span_ids, protected_mask, read_mask: as in `compress`.
            prefill_chunk_size: run the layers over this many columns at a time, to bound the working memory.

        Returns:
            `last_hidden_state` [B, T, H] and no `span_ids` where nothing merged; else [B, M, H] over the slots.
        """
        if compression and input_ids is not None:
            prompt = self.compress(
                input_ids,
                _last_columns(attention_mask, input_ids),
                span_ids,
                target_ratio,
                protected_mask,
                read_mask,
                position_ids,
                past_key_values=past_key_values,
            )
            if prompt.is_merged:
                return self._forward_slots(prompt, past_key_values, use_cache, prefill_chunk_size, **kwargs)
        if tracks_slots(past_key_values):
            tokens = input_ids if input_ids is not None else inputs_embeds[..., 0]
            attention_mask, position_ids = _append_plain(
                past_key_values, tokens, attention_mask, position_ids, self.config.position_mode
            )
        inputs = {"input_ids": input_ids} if input_ids is not None else {"inputs_embeds": inputs_embeds}
        return self._run_layers(
            inputs, attention_mask, position_ids, past_key_values, use_cache, prefill_chunk_size, **kwargs
        )

    def _forward_slots(
        self, prompt: CompressedPrompt, cache: Any, use_cache: bool | None, chunk_size: int | None, **kwargs: Any
    ) -> SemTokenModelOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            cache = SemTokenCache(config=self.config)
        # Without a cache and a mask, Transformers would read gapped positions as packed sequences.
        mask = prompt.attention_mask
        if cache is not None:
            tokens = prompt.span_ids.shape[1]
            cache.record(prompt.slot_lengths, tokens, compressed=True, padded=prompt.is_padded)
            mask = cache.attention_mask
        outputs = self._run_layers(
            {"inputs_embeds": prompt.inputs_embeds}, mask, prompt.position_ids, cache, use_cache, chunk_size, **kwargs
        )
        return SemTokenModelOutputWithPast(
            **outputs, span_ids=prompt.span_ids, compressed_lengths=prompt.kept_lengths
        )

    def _run_layers(
        self,
        inputs: dict[str, Tensor],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        chunk_size: int | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The family's forward, in one go or `chunk_size` columns at a time."""
        (name, columns), length = next(iter(inputs.items())), next(iter(inputs.values())).shape[1]
        chunk_size = chunk_size if chunk_size and tracks_slots(cache) else length
        before = cache.physical_length() if tracks_slots(cache) else 0
        states = []
        for start in range(0, length, chunk_size):
            end = min(start + chunk_size, length)
            mask = attention_mask
            if length > chunk_size and mask is not None:
                mask = mask[:, : before + end]
            if tracks_slots(cache) and cache.is_compressed and mask is None:
                kwargs |= flash_attention_kwargs(
                    self.config._attn_implementation, len(columns), end - start, before + end, columns.device
                )
            outputs = super().forward(
                **{name: columns[:, start:end]},
                attention_mask=mask,
                position_ids=position_ids if length == chunk_size or position_ids is None else position_ids[:, start:end],
                past_key_values=cache,
                use_cache=use_cache,
                **{**kwargs, "return_dict": True},
            )
            states.append(outputs.last_hidden_state)
        if len(states) > 1:
            outputs.last_hidden_state = torch.cat(states, dim=1)
        return outputs


def _last_columns(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The part of a mask over all tokens so far that belongs to `input_ids`."""
    return None if mask is None else mask[:, -input_ids.shape[1] :]


def _append_plain(
    cache: Any, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, position_mode: str
) -> tuple[Tensor | None, Tensor | None]:
    """Record tokens that are appended one slot each; returns the mask and positions that the layers need.

    As long as the cache holds nothing merged, both are what the caller gave, so that the family's own path is exact.
    """
    new = _last_columns(attention_mask, tokens)
    slots = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device) if new is None else (new != 0).long()
    if cache.is_compressed and (position_mode == "compact" or position_ids is None):
        held = cache.compressed_lengths if position_mode == "compact" else cache.original_lengths
        position_ids = (held[:, None] + slots.cumsum(1) - 1).clamp(min=0)
    cache.record(slots, tokens.shape[1], compressed=False, padded=new is not None)
    return (cache.attention_mask if cache.is_compressed else attention_mask), position_ids


class SemTokenForCausalLMMixin(SemTokenPreTrainedMixin):
    """The language-modelling head and the hooks of `generate`."""

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
            prefill_chunk_size: run the layers over this many slots at a time.

        Returns:
            logits of the family's shape, [B, T, V] or [B, k, V].

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
        if not self._wants_compression(compression, target_ratio) or (input_ids is not None and input_ids.shape[1] < 2):
            return super().forward(**plain)
        if (reason := _why_not(input_ids, attention_mask, position_ids, past_key_values, kwargs)) is not None:
            self._warn_uncompressed(reason)
            return super().forward(**plain)
        read = read_mask_of(input_ids, labels, logits_to_keep)
        if read is None:
            return super().forward(**plain)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            compression=True,
            target_ratio=target_ratio,
            span_ids=_fit_to_call(span_ids, input_ids, past_key_values, "span_ids"),
            protected_mask=_fit_to_call(protected_mask, input_ids, past_key_values, "protected_mask"),
            read_mask=read,
            prefill_chunk_size=prefill_chunk_size,
            **{**kwargs, "return_dict": True},
        )
        return self._head(outputs, labels, logits_to_keep, **kwargs)

    def _head(
        self, outputs: BaseModelOutputWithPast, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> SemTokenCausalLMOutputWithPast:
        """Logits and loss at the positions that are read."""
        states, span_ids, loss = outputs.last_hidden_state, outputs.get("span_ids"), None
        vocab_size = self.config.vocab_size
        reads_labels = labels is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
        columns = None
        if span_ids is not None:
            first = states.shape[1] - outputs.compressed_lengths
            columns = (span_ids + first[:, None]).where(span_ids >= 0, -1)
        if columns is not None and reads_labels:
            states, targets, index = labelled_slot_states(states, columns, labels)
            scored = self.lm_head(states)
            loss = self.loss_function(
                logits=scored[None], labels=None, shift_labels=targets[None], vocab_size=vocab_size, **kwargs
            )
            logits = scored.new_full((labels.numel(), scored.shape[-1]), torch.nan)
            logits = logits.index_copy(0, index, scored).unflatten(0, labels.shape)
        else:
            if columns is None:
                logits = self.lm_head(kept_states(states, logits_to_keep))
            else:
                states, is_padding = kept_slot_states(states, columns, logits_to_keep)
                logits = self.lm_head(states).masked_fill(is_padding[..., None], torch.nan)
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
        wanted = self.config.compression if compression is None else compression
        ratio = self.config.target_ratio if target_ratio is None else target_ratio
        return bool(wanted) and not (ratio == 1 and self.config.max_kept_tokens is None)

    def _warn_uncompressed(self, reason: str) -> None:
        logger.warning_once(f"SemToken does not compress this call and runs the plain model exactly: {reason}")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not self._wants_compression(model_kwargs.get("compression"), model_kwargs.get("target_ratio")):
            return result
        cache = model_kwargs.get("past_key_values")
        if tracks_slots(cache) or getattr(cache, "_is_user_defined", False):
            return result
        if type(cache) is DynamicCache:
            model_kwargs["past_key_values"] = SemTokenCache(config=self.config, offloading=cache.offloading)
            return result
        kind = "generate(use_cache=False)" if cache is None else f"a {type(cache).__name__}"
        self._warn_uncompressed(f"{kind} cannot hold merged slots; use the default cache")
        model_kwargs["compression"] = False
        return result

    def _prefill(self, input_ids, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        if generation_config.prefill_chunk_size is None or not tracks_slots(model_kwargs.get("past_key_values")):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # Chunks of tokens would be planned one by one and cut at places that depend on padding: plan the whole prompt,
        # then run the layers over chunks of slots.
        model_kwargs = {**model_kwargs, "prefill_chunk_size": generation_config.prefill_chunk_size}
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


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
        return "paged attention manages its own cache"
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        return "a prepared attention mask cannot be shortened; pass a 2D mask"
    if cache is not None and not tracks_slots(cache):
        return f"{type(cache).__name__} cannot hold merged slots; pass a SemTokenCache or leave `past_key_values` out"
    if kwargs.get("shift_labels") is not None:
        return "`shift_labels` is not supported; pass `labels`"
    if position_ids is not None and attention_mask is None and bool((position_ids.diff(dim=-1) <= 0).any()):
        return "`position_ids` that restart mean packed sequences; pass one sequence a row"
    return None


def _fit_to_call(values: Tensor | None, input_ids: Tensor, cache: Any, name: str) -> Tensor | None:
    """Cut or extend what was given for the prompt to the tokens of this call.

    `generate` hands the same tensor to every call: to the first one, which may hold drafted tokens behind the
    prompt, and to later ones, which hold new tokens only.
    """
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.ndim != 2:
        raise ValueError(f"`{name}` must be a tensor of shape [batch, tokens]")
    start, tokens, length = cache.get_seq_length() if cache is not None else 0, input_ids.shape[1], values.shape[1]
    if length == tokens:
        return values
    if 0 < start < length == start + tokens:
        values = values[:, start:]
        if name == "span_ids":
            values = (values - values.where(values >= 0, values.max()).amin(1, keepdim=True)).where(values >= 0, -1)
        return values
    if start == 0 and length < tokens:
        extra = torch.arange(1, tokens - length + 1, device=values.device)
        drafted = values[:, -1:] + extra if name == "span_ids" else torch.zeros_like(values[:, :1] + extra)
        return torch.cat([values, drafted], dim=1)
    if 0 < length <= start:
        return None
    raise ValueError(f"`{name}` has {length} columns, but this call has {tokens} tokens after {start} in the cache")


__all__ = ["SemTokenForCausalLMMixin", "SemTokenModelMixin", "SemTokenModelOutputWithPast"]
