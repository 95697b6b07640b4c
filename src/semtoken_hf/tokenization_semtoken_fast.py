"""A fast tokenizer that can also plan: with `return_span_ids=True` a data loader does the model's planning.

- `SpanPlanner` is that planning: it needs a checkpoint's configuration and encoder, none of its layers.
- The marks of a chat say which tokens are the template's, and which are the user's question.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_semtoken import OLD_FIELDS, SemTokenConfigMixin
from .question_finding import is_sentence_end, question_of_turn
from .semantic_encoder import SemanticEncoder
from .span_planner import SpanPlan, always_protected, needs_encoder, plan_spans

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# What a padding token gets in each per-token output.
PADDING_VALUES = {"span_ids": -1, "protected_mask": 0, "query_mask": 0}
# Of `apply_chat_template`, for what happens after rendering.
ENCODING_ARGUMENTS = ("tokenize", "padding", "truncation", "max_length", "return_dict", "return_assistant_tokens_mask")
ENCODER_PREFIX = "semantic_encoder."
# Stands for a message's text while a chat is rendered, so that a message that says what the template says, such as
# "user", is not mistaken for it. From a private use area, which no tokenizer, template or text means anything by.
SENTINEL = re.compile("\ue000(\\d+)\ue001")


class SemTokenFastTokenizer(PreTrainedTokenizerFast):
    """`PreTrainedTokenizerFast` with two more outputs, off by default.

    Called with `return_span_ids=True` it adds `span_ids`, the slot of every token (-1 for padding), equal to what the
    model of the same checkpoint would plan; `target_ratio` sets the ratio. With `return_protected_mask=True` it adds
    `protected_mask`, 1 for the tokens that never merge. Both go straight into `model.generate(**encoding)`.

    The planner is read from the folder or Hub id that the tokenizer was loaded from, at the first use, and follows
    tokens that are added; or set `tokenizer.planner = SpanPlanner.from_model(model)`.
    """

    _planner: SpanPlanner | None = None
    _is_own_planner = False
    _hub_arguments: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As in Transformers; the planner is later read from the same revision, cache and place."""
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        tokenizer._hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        return tokenizer

    @property
    def planner(self) -> SpanPlanner:
        """The checkpoint's planner.

        Raises:
            ValueError: the tokenizer was not loaded from a checkpoint, and none was set.
        """
        if self._planner is None:
            if not self.name_or_path:
                raise ValueError(
                    "planning needs the checkpoint's encoder: load the tokenizer from the converted checkpoint, or set "
                    "`tokenizer.planner = SpanPlanner.from_model(model)`"
                )
            self._planner = SpanPlanner.from_pretrained(self.name_or_path, **self._hub_arguments)
            self._is_own_planner = True
        # Where more than added tokens is unknown, the tokenizer is of another model.
        if self._is_own_planner and self.vocab_size <= self._planner.config.vocab_size < len(self):
            self._planner.resize(len(self))
        return self._planner

    @planner.setter
    def planner(self, value: SpanPlanner | None) -> None:
        self._planner, self._is_own_planner = value, False

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        protect_template: bool = False,
        return_query_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers, with two more outputs for `model.generate(**encoding)`.

        Args:
            protect_template: add `protected_mask`, 1 for the tokens of the template: they never merge.
            return_query_mask: add `query_mask`, 1 for the tokens of the question at the end of the last user turn: they
                never merge and decide what else stays whole. Without it the model finds them by itself.

        Raises:
            ValueError: the output is no dict of tokens, or the template changes the messages' text.
        """
        return_query_mask = kwargs.pop("mark_question", return_query_mask)  # its name of before
        if not (protect_template or return_query_mask):
            return super().apply_chat_template(conversation, *args, **kwargs)
        if args or not kwargs.get("tokenize", True) or not kwargs.get("return_dict", True):
            raise ValueError(
                "`protect_template` and `return_query_mask` need `tokenize` and `return_dict`, as keywords"
            )
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError("`protect_template` and `return_query_mask` cannot be had with `sanitize_control_tokens`")
        return_tensors = kwargs.pop("return_tensors", None)
        asked = dict(kwargs.pop("tokenizer_kwargs", None) or {})
        render: Any = functools.partial(
            super().apply_chat_template,
            **{name: value for name, value in kwargs.items() if name not in ENCODING_ARGUMENTS},
            tokenize=False,
        )
        encoding: Any = super().apply_chat_template(
            conversation, **kwargs, tokenizer_kwargs={**asked, "return_offsets_mapping": True}
        )
        offsets = encoding["offset_mapping"] if asked.get("return_offsets_mapping") else encoding.pop("offset_mapping")
        # A batch is a list of chats, and a chat may be an object with `messages`.
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [getattr(chat, "messages", chat) for chat in conversation] if is_batched else [conversation]
        rows = offsets if is_batched else [offsets]
        masks = [
            chat_masks(row, content_spans(render, chat), chat, render(chat))
            for chat, row in zip(chats, rows, strict=True)
        ]
        for number, name in enumerate(("protected_mask", "query_mask")):
            if (protect_template, return_query_mask)[number]:
                values = [row[number] for row in masks]
                encoding[name] = values if is_batched else values[0]
        if return_tensors is not None:
            encoding.convert_to_tensors(return_tensors, prepend_batch_axis=not is_batched)
        return encoding

    def _encode_plus(
        self,
        text: Any,
        *args: Any,
        return_span_ids: bool = False,
        return_protected_mask: bool = False,
        target_ratio: float | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        if not (return_span_ids or return_protected_mask):
            return super()._encode_plus(text, *args, return_tensors=return_tensors, **kwargs)
        encoding = super()._encode_plus(text, *args, return_tensors=None, **kwargs)
        ids = encoding["input_ids"]
        is_batched = bool(ids) and isinstance(ids[0], list)
        rows = ids if is_batched else [ids]
        masks = encoding.get("attention_mask") or [[1] * len(row) for row in rows]
        masks = masks if isinstance(masks[0], list) else [masks]
        for name, values in self._per_token_outputs(
            rows, masks, return_span_ids, return_protected_mask, target_ratio
        ).items():
            encoding[name] = values if is_batched else values[0]
        if return_tensors is not None:
            encoding.convert_to_tensors(return_tensors, prepend_batch_axis=not is_batched)
        return encoding

    def _per_token_outputs(
        self,
        rows: list[list[int]],
        masks: list[list[int]],
        return_span_ids: bool,
        return_protected_mask: bool,
        target_ratio: float | None,
    ) -> dict[str, list[list[int]]]:
        outputs, protected_mask = {}, None
        width = max(map(len, rows))

        def to_tensor(values: list[list[int]]) -> torch.Tensor:
            return torch.tensor([row + [0] * (width - len(row)) for row in values], dtype=torch.long)

        if return_protected_mask:
            protected = {*special_token_ids(self), *self.planner.protected_token_ids}
            outputs["protected_mask"] = [
                [int(m and i in protected) for i, m in zip(row, mask, strict=True)]
                for row, mask in zip(rows, masks, strict=True)
            ]
            # The model gets this mask as well, so the budget must know of it.
            protected_mask = to_tensor(outputs["protected_mask"])
        if return_span_ids:
            plan = self.planner.plan(
                to_tensor(rows), to_tensor(masks), protected_mask=protected_mask, target_ratio=target_ratio
            )
            spans = plan.span_ids.tolist()
            outputs["span_ids"] = [ids[: len(row)] for ids, row in zip(spans, rows, strict=True)]
        return outputs

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        *args: Any,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> dict:
        extra = {name: encoded_inputs.pop(name) for name in PADDING_VALUES if name in encoded_inputs}
        padded = super()._pad(encoded_inputs, max_length, *args, padding_side=padding_side, **kwargs)
        length = len(padded[self.model_input_names[0]])
        for name, values in extra.items():
            padding = [PADDING_VALUES[name]] * (length - len(values))
            side = padding_side if padding_side is not None else self.padding_side
            padded[name] = [*values, *padding] if side == "right" else [*padding, *values]
        return padded


class SpanPlannerConfig(SemTokenConfigMixin, PreTrainedConfig):
    """The compression fields of any SemToken configuration, whatever its family."""

    model_type = "semtoken_planner"

    vocab_size: int = 32000
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class SpanPlanner:
    """Plans as the model of the same checkpoint does.

    Args:
        config: a SemToken configuration.
        encoder: its frozen encoder; None where planning needs none.
    """

    def __init__(self, config: Any, encoder: SemanticEncoder | None):
        self.config = config
        self.encoder: Any = encoder

    @classmethod
    def from_model(cls, model: Any) -> SpanPlanner:
        """The planner of a loaded model, sharing its encoder."""
        return cls(model.config, model.base_model.semantic_encoder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, config_fields: dict[str, Any] | None = None, **hub: Any
    ) -> SpanPlanner:
        """Load configuration and encoder from a checkpoint folder or Hub id.

        Args:
            name_or_path: as in `AutoModel.from_pretrained`.
            config_fields: compression fields instead of the checkpoint's.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `cached_file`.

        Raises:
            OSError: no such checkpoint, or its weights are damaged.
            ValueError: it holds no encoder, or one that does not fit its configuration; or a field is unknown or makes
                no sense.
        """
        known = {*SpanPlannerConfig.__dataclass_fields__, *OLD_FIELDS}
        if unknown := sorted(set(config_fields or ()) - known):
            raise ValueError(f"the configuration has no fields {unknown}")
        try:
            fields = PreTrainedConfig.get_config_dict(name_or_path, **hub)[0]
            fields = {key: value for key, value in fields.items() if key in known}
            config = SpanPlannerConfig(**fields)
        except OSError:
            raise
        except Exception as error:  # of whatever kind Transformers likes
            raise ValueError(f"config.json of {name_or_path} does not say how to plan: {error}") from error
        if config_fields:
            config = SpanPlannerConfig(**{**fields, **config_fields})
        weights = read_encoder_weights(name_or_path, needs_encoder(config), **hub)
        if not weights:
            return cls(config, None)
        with torch.device("meta"):  # so that nothing is as large as a damaged configuration says
            expected = {name: tensor.shape for name, tensor in SemanticEncoder(config).state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
            raise ValueError(
                f"the semantic encoder of {name_or_path} does not fit its config.json: {wrong[0]} and {len(wrong) - 1} "
                "more tensors are missing, unknown or of another shape"
            )
        encoder = SemanticEncoder(config)
        encoder.load_state_dict(weights)
        return cls(config, encoder)

    @property
    def protected_token_ids(self) -> list[int]:
        """Ids that never merge."""
        return always_protected(self.config)

    def resize(self, vocab_size: int) -> None:
        """Follow added tokens as `model.resize_token_embeddings` does: they get the encoder's mean state.

        A planner from `from_model` shares the model's encoder: resize the model.
        """
        self.config.vocab_size = vocab_size
        if self.encoder is not None:
            self.encoder.resize(vocab_size)

    def plan(self, input_ids: Tensor, attention_mask: Tensor | None = None, **planning: Any) -> SpanPlan:
        """As `plan_spans`: input_ids int64 [B, T], attention_mask [B, T]."""
        return plan_spans(self.config, self.encoder, input_ids, attention_mask, **planning)


def read_encoder_weights(name_or_path: str | os.PathLike, required: bool = True, **hub: Any) -> dict[str, Tensor]:
    """The encoder's tensors, float32, under the names of `SemanticEncoder`.

    Raises:
        OSError: a file is damaged.
        ValueError: the checkpoint holds none, and they are `required`.
    """
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        try:
            weight_map = json.loads(Path(index).read_bytes())["weight_map"]
            files = {str(file) for key, file in weight_map.items() if ENCODER_PREFIX in key}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{index} is damaged: {error!r}") from error
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        try:
            with safe_open(cached_file(name_or_path, file, **hub), "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (no mapping)
                    if ENCODER_PREFIX in key:
                        weights[key.split(ENCODER_PREFIX, 1)[1]] = shard.get_tensor(key).to(torch.float32)
        except SafetensorError as error:
            raise OSError(f"{file} of {name_or_path} is damaged: {error}") from error
    if required and not weights:
        raise ValueError(f"{name_or_path} holds no semantic encoder: convert it with `semtoken_hf.convert_checkpoint`")
    return weights


def content_spans(render: Callable[[list[dict]], str], messages: list[dict]) -> list[tuple[int, int, int]]:
    """Where the texts of the messages stand in the rendered chat.

    Args:
        render: messages -> rendered text, by the chat template.
        messages: `role` and `content`, a string or a list of parts with `text`.

    Returns:
        (first character, end, index of the message), in order.

    Raises:
        ValueError: the template changes the texts by more than stripping them.
    """
    contents: list[tuple[int, str]] = []

    def sentinel(number: int, text: str) -> str:
        if not text:  # a template may ask whether there is any
            return text
        contents.append((number, text))
        return f"\ue000{len(contents) - 1}\ue001"

    marked = [_map_texts(message, lambda text, n=n: sentinel(n, text)) for n, message in enumerate(messages)]
    rendered = render(messages)
    pieces = SENTINEL.split(render(marked))
    for change in (str, str.strip, str.rstrip, str.lstrip):
        text, spans = pieces[0], []
        for number, template in zip(pieces[1::2], pieces[2::2], strict=True):
            message, content = contents[int(number)]
            content = change(content)
            spans.append((len(text), len(text) + len(content), message))
            text += content + template
        if text == rendered:
            return spans
    raise ValueError(
        "the chat template changes the text of the messages, so that it is unknown which tokens are theirs: build "
        "`protected_mask` and `query_mask` by hand"
    )


def _map_texts(message: dict, function: Callable[[str], str]) -> dict:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": function(content)}
    if isinstance(content, (list, tuple)):
        parts = [{**p, "text": function(p["text"])} if isinstance(p.get("text"), str) else p for p in content]
        return {**message, "content": parts}
    return message


def chat_masks(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]], messages: list[dict], rendered: str
) -> tuple[list[int], list[int]]:
    """What each token of a rendered chat belongs to.

    Args:
        offsets: first character and end of each token; empty ones are padding.
        spans: of `content_spans`.
        messages: of the chat.
        rendered: the chat.

    Returns:
        Two lists of 0 and 1: tokens with any character of the template; tokens of the question, which is the last
        user's text or, where that is long, a line of it (see `question_finding.py`).
    """
    last_user = max((n for n, message in enumerate(messages) if message.get("role") == "user"), default=None)
    of_template, of_question = [], []
    for start, end in offsets:
        inside = [(first, last, n) for first, last, n in spans if first < end and start < last]
        covered = sum(min(end, last) - max(start, first) for first, last, _ in inside)
        of_template.append(int(covered < end - start))
        of_question.append(int(any(n == last_user for _, _, n in inside)))
    return of_template, _question_of(of_question, [rendered[start:end] for start, end in offsets])


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of BOS, EOS, PAD and every other special or added token, sorted.

    Added white space is text: the line breaks of Gemma's tokenizer and the indents of GPT-NeoX's are added tokens.
    """
    return sorted({*tokenizer.all_special_ids, *added_markup(tokenizer)})


def added_markup(tokenizer: Any) -> set[int]:
    """Ids of the added tokens that are no white space."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def _question_of(of_turn: list[int], texts: list[str]) -> list[int]:
    """The question in the tokens of a turn, lists of 0 and 1; `texts` are those of all tokens."""
    if 1 not in of_turn:
        return of_turn
    begin, end = of_turn.index(1), len(of_turn) - of_turn[::-1].index(1)
    breaks = torch.tensor(["\n" in text for text in texts])
    ends = torch.tensor([is_sentence_end(text) for text in texts])
    bounds = (torch.tensor([begin]), torch.tensor([end]))
    return question_of_turn(*bounds, breaks, ends, torch.zeros(len(of_turn), dtype=torch.long)).long().tolist()


__all__ = [
    "SemTokenFastTokenizer",
    "SpanPlanner",
    "SpanPlannerConfig",
    "added_markup",
    "chat_masks",
    "content_spans",
    "special_token_ids",
]
