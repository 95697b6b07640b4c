"""The compression fields of a SemToken configuration, shared by every model family.

A family's configuration is `class SemTokenXConfig(SemTokenConfigMixin, XConfig)`: the fields below, nothing else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .logging_semtoken import get_logger

logger = get_logger(__name__)
POSITION_MODES = ("original", "compact")
SEGMENTATION_MODES = ("sentence", "greedy", "boundary", "uniform")
OLD_FIELDS = ("recency",)  # still read, see `_read_old_fields`
# Names of before, which stand for the new ones wherever a field is read or set.
RENAMED = {"keep_first": "num_sink_tokens", "keep_last": "recent_window", "max_kept_tokens": "max_slots"}
TEXT_MARKERS = ("sentence_ends", "line_breaks", "turn_opening", "turn_ending")
MERGE_MODES = ("mean", "representative", "learned")
MERGER_BASES = ("mean", "representative")
ENCODER_DTYPES = ("auto", "float32", "bfloat16")
MOST, MOST_LAYERS = 2**63 - 1, 512  # an int64's
# Encoders whose first position is `pad_token_id + 1`.
POSITIONS_BEHIND_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
SERVER_MODULE = "transformers.cli.serving.model_manager"  # where `transformers serve` loads models


class SemTokenStaticEncoderConfig(PreTrainedConfig):
    """Encoder of kind `static`: one vector per token, context from the fingerprint window alone."""

    model_type = "semtoken_static"

    vocab_size: int = 32000
    hidden_size: int = 64

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, value in (("vocab_size", self.vocab_size), ("hidden_size", self.hidden_size)):
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"`{name}` must be an integer >= 1 and < 2**31, got {value!r}")


# As any other encoder's; each copy of this module has a class of its own.
AutoConfig.register(SemTokenStaticEncoderConfig.model_type, SemTokenStaticEncoderConfig, exist_ok=True)


def build_encoder_config(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A typed encoder configuration from what `config.json` holds; None is the static encoder."""
    if isinstance(value, PreTrainedConfig):
        return value
    if value is None:
        return SemTokenStaticEncoderConfig()
    if not isinstance(value, dict):
        raise ValueError(f"`encoder_config` must be a dict, a PreTrainedConfig or None, got {type(value).__name__}")
    values = dict(value)
    model_type = values.pop("model_type", None)
    check_layers(values, "`encoder_config`: ")
    is_static = model_type == SemTokenStaticEncoderConfig.model_type
    if not is_static and (not isinstance(model_type, str) or model_type not in CONFIG_MAPPING):
        raise ValueError(
            f"`encoder_config['model_type']` must be '{SemTokenStaticEncoderConfig.model_type}' or a model type that "
            f"Transformers knows (such as 'bert'), got {model_type!r}"
        )
    try:
        config = (SemTokenStaticEncoderConfig if is_static else CONFIG_MAPPING[model_type])(**values)
        if callable(config.dtype):  # Transformers looks the name up in torch, whatever it means there
            raise ValueError(f"`dtype` is none: {values['dtype']!r}")
        return config
    except Exception as error:  # of whatever kind that model's configuration likes
        raise ValueError(f"`encoder_config` is no configuration of '{model_type}': {error}") from error


@dataclass(kw_only=True, repr=False)
class SemTokenConfigMixin:
    """How a prompt is compressed. Lengths count tokens; cosines and entropies are of unit-norm fingerprints.

    Args:
        compression: False makes the model behave exactly like the family's plain model.
        target_ratio: tokens per slot, >= 1; at most `ceil(n / target_ratio)` slots are kept of an n-token prompt.
            None: no ratio; then `max_slots` or `similarity_threshold` decides.
        max_slots: absolute budget of slots of a prompt, beside the ratio (the smaller one counts).
        similarity_threshold: tau of the paper, in [-1, 1], for the greedy mode. None: solved for the budget, the
            highest at which merging every span is enough. A number: an upper bound on tau, lowered until the budget
            is met; what it leaves of the budget keeps the spans of highest entropy fine.
        entropy_threshold: delta of the paper, in [0, 1]: spans above it stay fine when no budget is set.
        query_weight: how much the question decides which sentences stay whole, against how late they stand, which
            counts up to 1: its relevance (see `sentence_selection.py`) is multiplied by this. The question is
            `query_mask` of the call, or the end of the last user turn of a chat. In [0, 16]; 0: none is looked for.
            Sentence mode only.
        max_span_length: L of the paper: no slot holds more tokens. At most 1,024.
        num_sink_tokens: tokens at the start of a row that stay whole.
        recent_window: tokens before every position that is read that stay whole.
        min_prompt_length: shorter segments are left alone.
        recompress_every: while generating, read the generated tokens again into merged slots whenever this many are
            there beyond the last `recent_window`, so that the cache grows at 1 / ratio. At least `min_prompt_length -
            recent_window`. None: generated tokens keep slots of their own.
        position_mode: "compact": slots stand at 0..m-1; "original": a slot carries the position of one of its tokens.
        segmentation_mode: "sentence" keeps whole sentences, those most relevant to the question or the latest, and
            merges what lies between; "greedy" is the paper's anchor clustering with its entropy budget; "boundary" cuts
            between the most dissimilar neighbours; "uniform" makes equal spans without an encoder.
        merge_mode: "mean" of the span's embeddings, its "representative" token, or "learned": one of the two with a
            trained residual (see `span_merging.py`).
        merger_base: what the residual is added to, "mean" or "representative".
        merger_rank: width of the residual's hidden layer, at most 8,192.
        adapter_subfolder: folder inside the checkpoint with a PEFT adapter that acts on compressed rows alone.
        adapted_for: what `semtoken_hf.training.adaptation` trained the checkpoint for (`position_mode` and more).
        encoder_config: configuration of the frozen encoder, on the model's own vocabulary. None: a static encoder.
        encoder_dtype: of the encoder's layers, whatever the model's (kind `transformer`): "auto" is bfloat16 where
            their device multiplies it natively and float32 elsewhere; or "float32" or "bfloat16" on every device.
        encoder_window: tokens per encoder window (kind `transformer`), at most 8,192.
        encoder_overlap: tokens shared by neighbouring windows, in [0, encoder_window).
        fingerprint_radius: k of the paper: a fingerprint is the mean of the states within +-k tokens, k <= 256.
        protected_token_ids: ids that always keep a slot of their own, beside BOS, EOS and padding.
        text_markers: lists of ids, found at conversion and read in the sentence mode: `sentence_ends`, tokens that end
            a sentence or a line; `line_breaks`; `turn_opening` and `turn_ending`, what the chat template puts before
            and behind the text of a user.

    Raises:
        ValueError: a field is out of its range; the message names the field and the range.
    """

    # Not predictions: `Trainer` must not gather them.
    keys_to_ignore_at_inference = ["past_key_values", "span_ids", "compressed_lengths"]
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    # A family that learns a vector for each position knows "compact" alone.
    position_modes: ClassVar[tuple[str, ...]] = POSITION_MODES
    attribute_map: ClassVar[dict[str, str]]

    compression: bool = True
    target_ratio: float | int | None = 2.4
    max_slots: int | None = None
    similarity_threshold: float | int | None = None
    entropy_threshold: float | int | None = None
    query_weight: float | int = 1.0
    max_span_length: int = 256
    num_sink_tokens: int = 4
    recent_window: int = 64
    min_prompt_length: int = 256
    recompress_every: int | None = None
    position_mode: str = "compact"
    segmentation_mode: str = "sentence"
    merge_mode: str = "representative"
    merger_base: str = "representative"
    merger_rank: int = 512
    adapter_subfolder: str | None = None
    adapted_for: dict | None = None
    encoder_config: dict | PreTrainedConfig | None = None
    encoder_dtype: str = "auto"
    encoder_window: int = 128
    encoder_overlap: int = 16
    fingerprint_radius: int = 2
    protected_token_ids: list[int] | None = None
    text_markers: dict | None = None

    def __init_subclass__(cls, *args: Any, **kwargs: Any):
        super().__init_subclass__(*args, **kwargs)
        cls.attribute_map = {**getattr(cls, "attribute_map", {}), **RENAMED}

    def __setattr__(self, name: str, value: Any) -> None:
        # Mostly a field of a loaded model: refused here, and not where a later call trips over it.
        name = RENAMED.get(name, name)
        if name in COMPRESSION_FIELDS:
            check_field(self, name, value)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        check_layers(vars(self))
        self._read_old_fields(kwargs)
        self.encoder_config = build_encoder_config(self.encoder_config)
        super().__post_init__(**kwargs)
        self.validate()  # the family's own checks: Transformers runs them for a class marked `@strict` alone
        # Checked here and not only by `@strict`, so that the message always names the field and its range.
        validate_compression_fields(self)

    def _read_old_fields(self, given: dict[str, Any]) -> None:
        """What a checkpoint of before says with fields that are gone: its default was blocks with a recency."""
        if not given.pop("recency", 0) or self.segmentation_mode != "greedy" or self.similarity_threshold != -1:
            return
        self.segmentation_mode, self.similarity_threshold = "sentence", None
        logger.warning_once(
            "This checkpoint was converted when `recency` decided what stays whole; it is read with "
            "segmentation_mode='sentence', which keeps more of what matters. Convert it again to let questions decide."
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in Transformers; fields given to `from_pretrained` are set after `__post_init__` and checked here."""
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        validate_compression_fields(config)
        _name_for_server(config)
        return result


def _name_for_server(config: Any) -> None:
    """Let `transformers serve` load remote code: to it, our architectures are `AutoModelForCausalLM`.

    It looks an architecture up among the names of Transformers and nowhere else, in a copy of that module of its own.
    """
    namespace: Any = getattr(sys.modules.get(SERVER_MODULE), "transformers", None)
    if namespace is None:
        return
    for name in config.architectures or ():
        if name.startswith("SemToken") and name.endswith("ForCausalLM") and not hasattr(namespace, name):
            setattr(namespace, name, namespace.AutoModelForCausalLM)


# What a configuration refuses as soon as it is set.
COMPRESSION_FIELDS = frozenset(field.name for field in fields(SemTokenConfigMixin))


def encoder_positions(encoder_config: PreTrainedConfig) -> int | None:
    """Longest window that an encoder reads; None where nothing limits it."""
    positions = getattr(encoder_config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    behind = encoder_config.model_type in POSITIONS_BEHIND_PADDING
    return positions - (encoder_config.pad_token_id or 0) - 1 if behind else positions


def base_merge_mode(config: Any) -> str:
    """How a slot is made before any learned residual: "mean" or "representative"."""
    return config.merger_base if config.merge_mode == "learned" else config.merge_mode


def check_layers(fields: dict[str, Any], where: str = "") -> None:
    """Raise ValueError where a model is said to be so deep that making its layers would never end."""
    for name, value in fields.items():
        if str(name).endswith("layers") and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{where}`{name}` must be at most {MOST_LAYERS}, got {value}")


def check_ratio(value: Any, name: str = "target_ratio") -> None:
    """Raise ValueError unless `value` is a finite number >= 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number >= 1, got {value!r}")


def check_query_weight(value: Any) -> None:
    """Raise ValueError unless `value` is a number in [0, 16]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 16:
        raise ValueError(f"`query_weight` must be a number in [0, 16], got {value!r}")


# Field -> lowest value, highest value, whether it may be None.
INTEGERS = {
    "max_slots": (1, MOST, True),
    "recompress_every": (1, MOST, True),
    "max_span_length": (1, 1024, False),
    "num_sink_tokens": (0, MOST, False),
    "recent_window": (0, MOST, False),
    "min_prompt_length": (0, MOST, False),
    "encoder_window": (1, 8192, False),
    "encoder_overlap": (0, MOST, False),
    "fingerprint_radius": (0, 256, False),
    "merger_rank": (1, 8192, False),
}
LOWEST_THRESHOLDS = {"similarity_threshold": -1.0, "entropy_threshold": 0.0}
CHOICES = {
    "segmentation_mode": SEGMENTATION_MODES,
    "merge_mode": MERGE_MODES,
    "merger_base": MERGER_BASES,
    "encoder_dtype": ENCODER_DTYPES,
}


def check_field(config: Any, name: str, value: Any) -> None:
    """Raise ValueError, naming the field and its range, unless `value` is one that the compression field may have."""
    if name in INTEGERS:
        _check_integer(name, value, *INTEGERS[name])
    elif name in CHOICES or name == "position_mode":
        choices = CHOICES.get(name) or config.position_modes
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}")
    elif name in LOWEST_THRESHOLDS:
        is_number, lowest = isinstance(value, (int, float)) and not isinstance(value, bool), LOWEST_THRESHOLDS[name]
        if value is not None and not (is_number and lowest <= value <= 1):
            raise ValueError(f"`{name}` must be a number in [{lowest:g}, 1] or None, got {value!r}")
    elif name == "target_ratio" and value is not None:
        check_ratio(value)
    elif name == "query_weight":
        check_query_weight(value)
    elif name == "compression" and not isinstance(value, bool):
        raise ValueError(f"`compression` must be True or False, got {value!r}")
    elif name == "adapted_for" and value is not None and not isinstance(value, dict):
        raise ValueError(f"`adapted_for` must be a dict or None, got {type(value).__name__}")
    elif name == "adapter_subfolder" and value is not None:
        if not isinstance(value, str) or not value.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"`adapter_subfolder` must be the plain name of a folder or None, got {value!r}")
    elif name == "protected_token_ids":
        _check_ids(name, value)
    elif name == "text_markers" and value is not None:
        if not (isinstance(value, dict) and set(value) <= set(TEXT_MARKERS)):
            raise ValueError(f"`text_markers` must be a dict of {list(TEXT_MARKERS)} or None, got {value!r}")
        for key, ids in value.items():
            _check_ids(f"text_markers['{key}']", ids)


def _check_integer(name: str, value: Any, low: int, high: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        upper = f" and <= {high}" * (isinstance(value, int) and value > high)
        raise ValueError(f"`{name}` must be an integer >= {low}{upper}{' or None' * optional}, got {value!r}")


def validate_compression_fields(config: Any) -> None:
    """Raise ValueError, naming the field and its range, if a compression field makes no sense."""
    for name in COMPRESSION_FIELDS:
        check_field(config, name, getattr(config, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(i, int) and abs(i) <= MOST for i in ids):
            raise ValueError(f"`{name}` must be a token id, a list of token ids or None, got {value!r}")
    check_fields_together(config)


def _check_ids(name: str, ids: Any) -> None:
    is_list = isinstance(ids, (list, tuple))
    if ids is not None and not (
        is_list and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MOST for i in ids)
    ):
        raise ValueError(f"`{name}` must be a list of token ids >= 0 or None")


def check_fields_together(config: Any) -> None:
    """Raise ValueError if fields that make sense alone contradict each other; read before every compressed call."""
    if config.encoder_overlap >= config.encoder_window:
        raise ValueError(
            f"`encoder_overlap` must be in [0, encoder_window) = [0, {config.encoder_window}), "
            f"got {config.encoder_overlap}"
        )
    longest = encoder_positions(config.encoder_config)
    if longest is not None and config.encoder_window > longest:
        raise ValueError(
            f"`encoder_window` must be at most the encoder's {longest} positions, got {config.encoder_window}"
        )
    every = config.recompress_every
    if every is not None and every + config.recent_window < config.min_prompt_length:
        raise ValueError(
            "`recompress_every` must be None or at least min_prompt_length - recent_window = "
            f"{config.min_prompt_length - config.recent_window}, since shorter text is left alone, got {every}"
        )
    tau = config.similarity_threshold
    by_threshold = config.segmentation_mode == "greedy" and tau is not None and tau > -1
    if config.target_ratio is None and config.max_slots is None and not by_threshold:
        raise ValueError(
            "set `target_ratio` or `max_slots`, or `similarity_threshold` > -1 with segmentation_mode='greedy': "
            "otherwise nothing decides how far to merge"
        )


__all__ = ["SemTokenConfigMixin", "SemTokenStaticEncoderConfig"]
