"""Stage 1: contextual fingerprints h_i = f(x_{i-k} .. x_{i+k}) from a frozen light encoder (SemToken, section 3.1).

- The encoder reads the language model's own ids: its input embedding was moved onto that vocabulary at conversion.
- Kind `transformer`: one pass over overlapping windows; a token takes its state from the window where it is farther
  from an edge. Kind `static`: one table look-up.
- A running mean over +-k states gives the window of the paper at a twenty-fifth of one encoder call per token.
- Always fp32, outside autocast and without gradient, so that a plan is the same for every dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_semtoken import SemTokenStaticEncoderConfig
from .token_layout import TokenLayout

# Windows per encoder call: bounds the activations, whatever the prompt length (64 x 128 tokens by default).
WINDOWS_PER_CALL = 64


class StaticEncoder(nn.Module):
    """A table of one state per token id."""

    def __init__(self, config: SemTokenStaticEncoderConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=torch.float32)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value


class FrozenLinear(nn.Module):
    """A linear layer of the encoder; no `nn.Linear`, so that PEFT's "all-linear" and quantisers pass it by."""

    forward = nn.Linear.forward

    def extra_repr(self) -> str:
        # PEFT quotes this where `target_modules` names the layer.
        return "frozen; leave it out with exclude_modules=r'.*semantic_encoder.*'"


def build_transformer(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder's layers in float32, with an attention of their own: the language model's may need half precision."""
    try:
        encoder = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except ValueError:  # an architecture without SDPA
        encoder = AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for module in encoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear  # type: ignore[assignment]
    return encoder


class SemanticEncoder(nn.Module):
    """The frozen encoder and its fingerprints.

    Args:
        config: a SemToken configuration; `encoder_config`, `encoder_window`, `encoder_overlap`, `fingerprint_radius`
            and `vocab_size` are read.
    """

    def __init__(self, config: Any):
        super().__init__()
        encoder_config = config.encoder_config
        encoder_config.vocab_size = config.vocab_size
        self.window, self.overlap = config.encoder_window, config.encoder_overlap
        self.width = encoder_config.hidden_size
        self.radius = config.fingerprint_radius
        self.is_static = encoder_config.model_type == SemTokenStaticEncoderConfig.model_type
        if self.is_static:
            self.encoder: Any = StaticEncoder(encoder_config)
        else:
            self.encoder = build_transformer(encoder_config)
        self.freeze()

    def freeze(self) -> SemanticEncoder:
        """Evaluation mode, no gradients; `from_pretrained` and `train()` undo both."""
        super().train(False)
        return self.requires_grad_(False)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Follow a resized vocabulary: new ids get the mean of the known states."""
        old = self.encoder.get_input_embeddings().weight
        table = old.mean(0, keepdim=True).repeat(vocab_size, 1)
        kept = min(vocab_size, len(old))
        table[:kept] = old[:kept]
        self.encoder.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=True))

    def train(self, mode: bool = True) -> SemanticEncoder:
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SemanticEncoder:
        # `model.half()` and `model.to(dtype)` move the encoder but leave it float32.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def count_windows(self, layout: TokenLayout) -> Tensor:
        return layout.lengths.new_zeros(())

    @torch.no_grad()
    def forward(self, input_ids: Tensor, layout: TokenLayout, windows: int | None = None) -> Tensor:
        """Fingerprints of the stream.

        Args:
            input_ids: int64 [N], token ids of the stream.
            layout: its stretches.

        Returns:
            float32 [N, D] of unit norm; zero in stretches where nothing may merge.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            if self.is_static:
                states = self.encoder.embeddings(input_ids).float()
            else:
                states = self._encode_windows(input_ids, layout)
            return F.normalize(self._running_mean(states, layout.stretch), dim=-1)

    def _encode_windows(self, input_ids: Tensor, layout: TokenLayout) -> Tensor:
        """States [N, D] of every token of the stretches in which something may merge."""
        length, stride = self.window, self.window - self.overlap
        planned = torch.zeros_like(layout.lengths).index_add_(0, layout.stretch, layout.joinable.long()) > 0
        counts = torch.where(planned, 1 + (layout.lengths - length).clamp(min=0).add(stride - 1) // stride, 0)
        total = int(counts.sum())
        if total == 0:
            return input_ids.new_zeros((len(input_ids), self.width), dtype=torch.float32)

        stretch = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)
        first_window = counts.cumsum(0) - counts
        number = torch.arange(total, device=counts.device) - first_window[stretch]
        # The last window ends with its stretch, so only stretches shorter than a window need padding.
        start = torch.minimum(number * stride, (layout.lengths[stretch] - length).clamp(min=0))
        within = start[:, None] + torch.arange(length, device=counts.device)
        mask = within < layout.lengths[stretch][:, None]
        tokens = layout.starts[stretch][:, None] + within.where(mask, 0)
        states = torch.cat(
            [
                self._encode(input_ids[t], m)
                for t, m in zip(tokens.split(WINDOWS_PER_CALL), mask.split(WINDOWS_PER_CALL), strict=True)
            ]
        )

        # The owner is the window whose middle is nearest: by stride, except that the last one is shifted back.
        offset = torch.arange(len(input_ids), device=counts.device) - layout.starts[layout.stretch]
        last = (counts[layout.stretch] - 1).clamp(min=0)
        owner = ((offset - self.overlap // 2).clamp(min=0) // stride).minimum((last - 1).clamp(min=0))
        last_start = (layout.lengths[layout.stretch] - length).clamp(min=0)
        owner = torch.where(2 * offset >= owner * stride + last_start + length, last, owner)
        window = (first_window[layout.stretch] + owner).clamp(max=total - 1)
        column = (offset - start[window]).clamp(0, length - 1)
        picked = states.flatten(0, 1)[window * length + column]
        return picked * planned[layout.stretch][:, None]

    def _encode(self, windows: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states float32 [K, W, D] of windows int64 [K, W]; mask bool [K, W]."""
        # Embeddings and not ids: RoBERTa would take an id that equals its padding id for padding.
        embeds = self.encoder.get_input_embeddings()(windows)
        return self.encoder(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state.float()

    def _running_mean(self, states: Tensor, stretch: Tensor) -> Tensor:
        """Mean over +-radius tokens of the same stretch, by shifted sums: exact whatever lies around the stretch."""
        if self.radius == 0 or len(states) == 0:
            return states
        total, count = states.clone(), torch.ones_like(stretch)
        for shift in range(1, min(self.radius, len(states) - 1) + 1):
            same = stretch[shift:] == stretch[:-shift]
            total[:-shift] += states[shift:] * same[:, None]
            total[shift:] += states[:-shift] * same[:, None]
            count[:-shift] += same
            count[shift:] += same
        return total / count[:, None]


__all__ = ["SemanticEncoder", "StaticEncoder"]
