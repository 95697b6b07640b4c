"""A fast tokenizer that can also plan: with `return_span_ids=True` a data loader does the model's planning."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .chat_semtoken import chat_masks, content_spans
from .standalone_planner import SpanPlanner

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# What a padding token gets in each per-token output.
PADDING_VALUES = {"span_ids": -1, "protected_mask": 0, "query_mask": 0}
# Of `apply_chat_template`, for what happens after rendering.
ENCODING_ARGUMENTS = ("tokenize", "padding", "truncation", "max_length", "return_dict", "return_assistant_tokens_mask")


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
            protected = {*self.all_special_ids, *self.added_tokens_decoder, *self.planner.protected_token_ids}
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


__all__ = ["SemTokenFastTokenizer"]
