"""SemToken on any decoder of Transformers: what a family's heads beside the language model inherit.

- A sequence classifier, and so a reward model, reads one token: the last that is no padding. The rest may merge.
- Heads that say something about every token read every token: they are exactly the plain model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache_semtoken import mask_of_turn
from .compression import log_prefill
from .pretrained_semtoken import PlainTuple, SemTokenHeadMixin
from .read_positions import KeptPositions


@dataclass
class SemTokenSequenceClassifierOutputWithPast(PlainTuple, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast`; as a tuple, exactly that.

    Args:
        span_ids: int64 [B, T], slot of every token, -1 for padding; None where nothing merged.
        compressed_lengths: int64 [B], slots of each row; None where nothing merged.
    """

    span_ids: Tensor | None = None
    compressed_lengths: Tensor | None = None


class SemTokenClassificationMixin(SemTokenHeadMixin):
    """What these heads share: most of Transformers' make their base model with `AutoModel`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        # Where it knows the class it does not ask for trust in remote code; each module of a checkpoint may bring a
        # configuration class of its own.
        AutoModel.register(type(config), self.base_class, exist_ok=True)
        super().__init__(config, *args, **kwargs)


class SemTokenForSequenceClassificationMixin(SemTokenClassificationMixin):
    """A head over the last token of each row."""

    auto_class = "AutoModelForSequenceClassification"

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
        compression: bool | None = None,
        target_ratio: float | None = None,
        span_ids: Tensor | None = None,
        protected_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_weight: float | None = None,
        **kwargs: Any,
    ) -> SemTokenSequenceClassifierOutputWithPast:
        """The family's forward; all tokens but the one that is classified, and what stands before it, may merge.

        Args:
            labels: as in Transformers, of the rows.
            compression: False is exactly the plain model; None takes the configuration's.
            target_ratio, span_ids, protected_mask, query_mask, query_weight: as in `compress`.

        Returns:
            logits [B, num_labels]. Where tokens merged, `hidden_states` and `attentions` are over slots.

        Raises:
            ValueError: a mask or `span_ids` has the wrong shape or values, or the ratio is below 1.
        """
        call: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
            "return_dict": True,
        }
        prompt = None
        wanted = self._wants_compression(compression, target_ratio, query_weight) and self._is_compressible(call)
        if wanted and (read := self._classified_mask(call)) is not None:
            prompt = self._compress_call(
                call,
                read_mask=read,
                target_ratio=target_ratio,
                span_ids=span_ids,
                protected_mask=protected_mask,
                query_mask=query_mask,
                query_weight=query_weight,
            )
        if prompt is not None and prompt.is_merged:
            outputs = super().forward(**call, slot_reading=KeptPositions(prompt, 0))
            return SemTokenSequenceClassifierOutputWithPast.of(outputs, prompt)
        outputs = SemTokenSequenceClassifierOutputWithPast.of(super().forward(**call, compression=False))
        if prompt is not None:
            log_prefill(prompt, outputs.past_key_values)
        return outputs

    def _classified_mask(self, call: dict[str, Any]) -> Tensor | None:
        """bool [B, T], the token of each row that is classified, found as the family does; None where one is hidden."""
        ids, padding = call["input_ids"], self.config.pad_token_id
        column = torch.arange(ids.shape[1], device=ids.device)
        last = (column * (ids != padding)).argmax(1) if padding is not None else column[-1:].expand(len(ids))
        read = column == last[:, None]
        mask = mask_of_turn(call["attention_mask"], ids, call["past_key_values"])
        if mask is None or bool(mask[read].all()):
            return read
        self._warn_uncompressed(
            f"`attention_mask` hides the classified token, the last other than `config.pad_token_id` ({padding}); "
            "set that to the id that pads the rows"
        )
        return None


class SemTokenTokenwiseMixin(SemTokenClassificationMixin):
    """A head over every token: the plain model, bit for bit."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.base_model.reads_every_token = True


class SemTokenForTokenClassificationMixin(SemTokenTokenwiseMixin):
    auto_class = "AutoModelForTokenClassification"


class SemTokenForQuestionAnsweringMixin(SemTokenTokenwiseMixin):
    auto_class = "AutoModelForQuestionAnswering"


__all__ = [
    "SemTokenForQuestionAnsweringMixin",
    "SemTokenForSequenceClassificationMixin",
    "SemTokenForTokenClassificationMixin",
    "SemTokenSequenceClassifierOutputWithPast",
]
