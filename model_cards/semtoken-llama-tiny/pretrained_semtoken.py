"""What every SemToken model of any family has: loading, saving and `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.utils import ModelOutput

from .adapter_semtoken import load_adapter, remembering_rows, save_adapter, saves_adapter, without_adapter
from .cache_semtoken import is_semtoken_cache, is_static_cache, mask_of_turn
from .compression import CompressedPrompt, compress_prompt
from .configuration_semtoken import check_fields_together, check_query_weight, check_ratio
from .logging_semtoken import warn_of_fallback
from .read_positions import read_mask_of
from .semantic_encoder import SemanticEncoder
from .span_merging import LearnedMerger
from .span_planner import check_ids

# Of `from_pretrained`, for the files that are fetched beside the model's own.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
PAGED = (
    "continuous batching of slots needs the package, which a checkpoint does not carry: pip install semtoken-hf, and "
    "use `generate_batch` or the manager of `init_continuous_batching`"
)
FILLED_PLAIN = (
    "the cache is filled by a call that asks for all logits, or by calls below `min_prompt_length` tokens; write "
    "`cache = model(input_ids, logits_to_keep=1).past_key_values` over the whole text, without a cache of your own, or "
    "`model.compress_prefix(input_ids)`"
)
ALL_SCORED = "all positions are scored: nothing can merge; give the prompt the label -100"
NO_LABELS = (
    "all positions are scored: nothing can merge; this training call has neither `labels` nor `logits_to_keep`: "
    "`Trainer` keeps the labels back for label smoothing and for a loss of its own"
)
CALLED_ALONE = (
    "the base model of a language model was called by itself, and whoever does so expects a state for each token; pass "
    "`labels` or `logits_to_keep`, or `compression=True` for the states of slots"
)
# How a collator marks several sequences in a row, beside positions that restart.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Of a forward, beyond the plain model's.
OWN_OUTPUTS = ("span_ids", "compressed_lengths")


class PlainTuple(ModelOutput):
    """An output that is the plain model's as a tuple, whether anything merged or not."""

    def to_tuple(self) -> tuple:
        return tuple(self[name] for name in self.keys() if name not in OWN_OUTPUTS)

    @classmethod
    def of(cls, outputs: Any, prompt: CompressedPrompt | None = None) -> Any:
        """The family's output, and what became of the prompt."""
        own = (None, None) if prompt is None else (prompt.span_ids, prompt.kept_lengths)
        return cls(**outputs, **dict(zip(OWN_OUTPUTS, own, strict=True)))


class SemTokenPreTrainedMixin:
    """Loading and saving, with an encoder that is part of the checkpoint and frozen, and what compresses."""

    # What the family's classes bring.
    config: Any
    config_class: Any
    base_model: Any
    get_output_embeddings: Any
    loss_function: Any
    training: bool
    is_gradient_checkpointing: bool
    post_init: Any
    get_input_embeddings: Any
    _auto_class: str | None
    state_dict: Any

    _no_split_modules: Any

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            cls._no_split_modules = [*(cls._no_split_modules or ()), "SemanticEncoder"]

    # While loading, so that no other dtype rounds it; `SemanticEncoder.freeze` gives it back its own.
    _keep_in_fp32_modules_strict = ["semantic_encoder"]
    # What quantisers leave alone: they match it from the start of a module's name.
    _keep_in_fp32_modules = [".*semantic_encoder"]

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, LearnedMerger):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """As in Transformers.

        Raises:
            ValueError: the checkpoint holds no encoder, as a plain one does, or it is split into pipeline stages.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        is_old = any(key.endswith("learned_merger.place_mix") for key in info["unexpected_keys"])
        if is_old and model.config.merge_mode == "learned":
            raise ValueError(
                "the checkpoint's learned merger is of an earlier kind, which reads no context: adapt the checkpoint "
                "again, or load it with `merge_mode='representative'` to go without"
            )
        missing = [key for key in info["missing_keys"] if "semantic_encoder." in key]
        if missing and model.config.segmentation_mode != "uniform":
            raise ValueError(
                f"the checkpoint holds no semantic encoder ({missing[0]} and {len(missing) - 1} more are missing): "
                "convert it first with `semtoken_hf.convert_checkpoint(model, encoder, output_dir)`"
            )
        if getattr(model, "_pp_stage", None) is not None and model.config.compression:
            raise ValueError(
                "pipeline parallelism hands later stages hidden states instead of tokens, so that nothing can be "
                "compressed: use tensor parallelism or `device_map`, or load with `compression=False`"
            )
        with torch.no_grad():
            for key in missing:  # nothing reads it; Transformers would leave what the memory held
                model.get_parameter(key).zero_()
        for module in model.modules():
            if isinstance(module, SemanticEncoder):
                module.freeze()
        if model.config.adapter_subfolder is not None:
            checkpoint = args[0] if args else kwargs["pretrained_model_name_or_path"]
            load_adapter(model, checkpoint, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any):
        """As in Transformers; the folder then serves the Auto classes of all heads of the family.

        A checkpoint with an adapter for compressed rows keeps it in a subfolder, beside the unchanged base weights.
        """
        if self._auto_class is not None:
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**known, **auto_map_of(type(self.base_model))}
        # Loading has set it to the model's.
        self.config.encoder_config.dtype = self.base_model.semantic_encoder.dtype
        if not saves_adapter(self):
            return super().save_pretrained(save_directory, *args, **kwargs)
        state = kwargs.pop("state_dict", None)
        kwargs["state_dict"] = without_adapter(self.state_dict() if state is None else state)
        save_adapter(self, Path(save_directory) / self.config.adapter_subfolder)
        # Transformers would save the adapter and nothing else.
        self._hf_peft_config_loaded = False
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._hf_peft_config_loaded = True

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        # The adapter is written before Transformers notes what was there, and has to count as new when it pushes.
        known = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in known.items() if name != self.config.adapter_subfolder}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        def run(function: Any, *inputs: Any, **options: Any) -> Any:
            return gradient_checkpointing_func(remembering_rows(function), *inputs, **options)

        super()._set_gradient_checkpointing(enable, run, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the encoder keeps its own attention: others may need another dtype, or a paged cache."""
        recorded, used = self.config.encoder_config, getattr(self.base_model.semantic_encoder.encoder, "config", None)
        own = None if used is None else used._attn_implementation
        chosen: str | dict = attn_implementation
        if isinstance(attn_implementation, str):
            # The encoder has a copy of what is recorded: Transformers would look for its model, and warn.
            chosen = {"": attn_implementation, "encoder_config": recorded._attn_implementation}
        super().set_attn_implementation(chosen, *args, **kwargs)
        if isinstance(attn_implementation, str):
            recorded._attn_implementation = self.config._attn_implementation
        if used is not None:
            used._attn_implementation_internal = own

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
        query_mask: Tensor | None = None,
        query_weight: float | None = None,
    ) -> CompressedPrompt:
        """The compression stage alone.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding on any side; or over all tokens so far, with those in the cache.
            span_ids: int [B, T], a ready plan (see `SemTokenFastTokenizer`) instead of the model's own.
            target_ratio: tokens per slot, instead of the configuration's.
            protected_mask: [B, T], non-zero for tokens that stay whole.
            read_mask: bool [B, T], positions that will be read; None: the last token of each row.
            position_ids: int64 [B, T], positions of the tokens; None: counted along each row.
            position_mode: "original" or "compact", instead of the configuration's.
            past_key_values: a SemTokenCache that the slots will be appended to.
            query_mask: [B, T], non-zero for the tokens of the question, which stay whole; None: the end of the last
                user turn of a chat.
            query_weight: how much the question decides what else stays whole, instead of the configuration's.

        Raises:
            ValueError: a mask or `span_ids` has the wrong shape or values, or the ratio is below 1.
        """
        model, offset = self.base_model, None
        check_fields_together(self.config)
        model.semantic_encoder.check_unchanged(self.config)
        if self.config.merge_mode == "learned" and model.learned_merger is None:
            raise ValueError("the model was loaded without a learned merger: set `merge_mode` back, or load it again")
        mode = self.config.position_mode if position_mode is None else position_mode
        if is_semtoken_cache(past_key_values) and past_key_values.slot_lengths is not None:
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
            merger=model.learned_merger if self.config.merge_mode == "learned" else None,
            attention_mask=mask_of_turn(attention_mask, input_ids, past_key_values),
            read_mask=read_mask,
            protected_mask=protected_mask,
            span_ids=span_ids,
            target_ratio=target_ratio,
            is_sequence_start=offset is None,
            query_mask=query_mask,
            query_weight=query_weight,
        )

    def _compress_call(self, call: dict[str, Any], **planning: Any) -> CompressedPrompt:
        """The prompt of a call of `forward` as slots, without what only its page shows: the layers need the room."""
        names = ("attention_mask", "position_ids", "past_key_values")
        prompt = self.compress(call["input_ids"], **{name: call[name] for name in names}, **planning)
        prompt.origin = None
        return prompt

    def _wants_compression(
        self, compression: bool | None, target_ratio: float | None, query_weight: float | None = None
    ) -> bool:
        """Whether a call and the configuration ask for it; refuses nonsense whatever else the call asks for."""
        if target_ratio is not None:
            check_ratio(target_ratio)
        if query_weight is not None:
            check_query_weight(query_weight)
        if not isinstance(compression, bool | type(None)):
            raise ValueError(f"`compression` must be True or False, got {compression!r}")
        wanted = self.config.compression if compression is None else compression
        ratio = self.config.target_ratio if target_ratio is None else target_ratio
        return bool(wanted) and not (ratio == 1 and self.config.max_slots is None)

    def _read_mask(self, call: dict[str, Any], reads: dict[str, Any]) -> Tensor | None:
        """bool [B, T]: the positions that a call reads; None where nothing can be compressed, with a warning that says
        why unless the call plainly asks for all logits.

        Args:
            call: arguments of `forward`.
            reads: of `labels`, `shift_labels` and `logits_to_keep`, those of the head; empty: nobody knows.
        """
        labels, kept = reads.get("labels"), reads.get("logits_to_keep", 0)
        keeps_all = isinstance(kept, int) and kept == 0
        is_silent = keeps_all and labels is None
        if is_silent and reads and not self.training:
            return None
        if not self._is_compressible({**call, "shift_labels": reads.get("shift_labels")}):
            return None
        read = None
        if not is_silent:
            read = read_mask_of(call["input_ids"], labels, kept, call["attention_mask"])
        if read is None and keeps_all:
            self._warn_uncompressed(CALLED_ALONE if not reads else ALL_SCORED if labels is not None else NO_LABELS)
        return read

    def _is_compressible(self, call: dict[str, Any]) -> bool:
        """Whether the compression stage can read a call of `forward`; warns where only its form forbids it."""
        columns = call["inputs_embeds"] if call["input_ids"] is None else call["input_ids"]
        if getattr(columns, "ndim", 0) >= 2 and self._is_short(columns.shape[1]):
            if columns.shape[1] > 1 and self._is_filled_plain(call["past_key_values"], columns.shape[1]):
                self._warn_uncompressed(FILLED_PLAIN)
            return False
        if (reason := _unsupported_reason(call, self.config._attn_implementation)) is not None:
            self._warn_uncompressed(reason)
            return False
        check_ids(call["input_ids"])
        return True

    def _is_short(self, length: int | None) -> bool:
        return length is not None and length < max(2, self.config.min_prompt_length)

    def _is_filled_plain(self, cache: Any, tokens: int) -> bool:
        """Whether `tokens` come behind text that is long enough to merge, and that was read plain."""
        if is_semtoken_cache(cache):
            return cache.plain_pieces > 0 and not self._is_short(cache.plain_pieces + tokens)
        return isinstance(cache, DynamicCache) and not self._is_short(cache.get_seq_length())

    def _warn_if_filled_plain(self, call: dict[str, Any]) -> None:
        """Warn of a call that fills a cache and asks for the logits of all its tokens."""
        ids, cache = call["input_ids"], call["past_key_values"]
        is_new = cache is None if call["use_cache"] else isinstance(cache, DynamicCache)
        if not is_new or getattr(ids, "ndim", 0) != 2 or self._is_short(ids.shape[1]):
            return
        if cache is None or not cache.get_seq_length():
            self._warn_uncompressed(FILLED_PLAIN)

    def _warn_uncompressed(self, reason: str) -> None:
        warn_of_fallback(reason)


class SemTokenHeadMixin(SemTokenPreTrainedMixin):
    """A head over a SemToken base model. A family names that model in `base_class`, which also says the configuration.

    Attributes:
        auto_class: name of the Auto class that finds the head.
    """

    auto_class: str
    base_class: Any
    base_model_prefix: str
    add_module: Any

    def __init_subclass__(cls, **kwargs: Any):
        if "base_class" in cls.__dict__:
            cls.config_class = cls.base_class.config_class
            # Some heads of Transformers call it otherwise, and could not read the folder of a language model.
            cls.base_model_prefix = cls.base_class.base_model_prefix
            cls.base_class.heads = (*cls.base_class.heads, cls)
        super().__init_subclass__(**kwargs)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        checkpoints = getattr(config, "gradient_checkpointing", None)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not isinstance(self.base_model, self.base_class):
            if checkpoints is not None:  # the family's base model has taken it out
                config.gradient_checkpointing = checkpoints
            self.add_module(self.base_model_prefix, self.base_class(config))
            self.post_init()


def auto_map_of(base: Any) -> dict[str, str]:
    """`auto_map` of a family's base model and its heads: `module.class` by the name of the Auto class."""
    served = {"AutoModel": base} | {head.auto_class: head for head in base.heads}
    return {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in served.items()}


def slot_step_of(kwargs: dict[str, Any]) -> Any:
    """The `SlotStep` that a manager of continuous batching left in the paged cache: what this forward reads in place of
    its ids. None elsewhere."""
    return getattr(kwargs.get("cache"), "slot_step", None)


def _unsupported_reason(call: dict[str, Any], attn_implementation: str | None) -> str | None:
    """Why a call of `forward` cannot be compressed, or None."""
    if attn_implementation == "vllm":  # of its backend for remote code
        return "vLLM keeps its own cache of every token; serve what `semtoken export` writes, with the plugin"
    mask, positions, cache = call["attention_mask"], call["position_ids"], call["past_key_values"]
    if call["input_ids"] is None:
        return "`inputs_embeds` has no token ids to plan with; pass `input_ids`"
    if "cache" in call or "block_table" in call:
        return PAGED
    if is_static_cache(cache):
        return "a static cache holds the slots of the prompt that it was made for; use the default cache for chats"
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        return "a prepared attention mask cannot be shortened; pass a 2D mask"
    if cache is not None and not is_semtoken_cache(cache):
        return (
            f"{type(cache).__name__} cannot hold merged slots; leave `past_key_values` out, or fill a SemTokenCache: "
            "`cache = model(input_ids, logits_to_keep=1).past_key_values`"
        )
    if call.get("shift_labels") is not None:
        return "`shift_labels` is not supported; pass `labels`"
    if isinstance(positions, Tensor) and mask is None and bool((positions.diff(dim=-1) <= 0).any()):
        return "`position_ids` that restart mean packed sequences; pass one sequence a row"
    if (name := packing_argument(call)) is not None:
        return f"`{name}` means packed sequences; pass one sequence a row"
    return None


def packing_argument(call: dict[str, Any]) -> str | None:
    """Which argument of a call of `forward` marks several sequences in a row, or None."""
    return next((name for name in PACKING_ARGUMENTS if call.get(name) is not None), None)


__all__ = [
    "PAGED",
    "PlainTuple",
    "SemTokenHeadMixin",
    "SemTokenPreTrainedMixin",
    "auto_map_of",
    "packing_argument",
    "slot_step_of",
]
