"""Stage 1: contextual fingerprints h_i = f(x_{i-k} .. x_{i+k}) from a frozen light encoder (SemToken, section 3.1).

- The encoder reads the language model's own ids: its input embedding was moved onto that vocabulary at conversion.
- Kind `transformer`: one pass over overlapping windows; a token takes its state from the window where it is farther
  from an edge. Kind `static`: one table look-up.
- A running mean over +-k states gives the window of the paper at a twenty-fifth of one encoder call per token.
- In a dtype of its own (`encoder_dtype`; a table is always float32), outside autocast and without gradient, so that a
  plan is the same for every dtype of the model. Means and fingerprints are float32.
- bfloat16 layers round states to 8 bits. One device rounds the same way every time; on another, whose kernels sum in
  another order or which runs float32, spans may swap whose scores tie to within that rounding (about 1 %).
- Memory beyond the fingerprints does not grow with the prompt.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_semtoken import SemTokenStaticEncoderConfig
from .token_layout import TokenLayout

# Windows per encoder call: bounds the activations, whatever the prompt length (32 x 128 tokens by default).
WINDOWS_PER_CALL = 32
# Smaller products may be summed in another order, and bfloat16 shows it: a row alone would get another plan. Found by
# trial, with layers 256 to 4,096 wide.
FEWEST_TOKENS_PER_CALL = 768
# Sets of instructions that multiply bfloat16, on x86 and on ARM, and kernels of PyTorch that use none of them.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
NARROW_KERNELS = ("DEFAULT", "NO AVX", "AVX2") if platform.machine() in ("x86_64", "AMD64") else ()
# Tokens per step of the running mean.
TOKENS_PER_STEP = 4096


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
    """A linear layer of the encoder; no `nn.Linear`, so that PEFT's "all-linear" and quantisers pass it by.

    Args:
        linear: whose parameters it takes.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias)

    def extra_repr(self) -> str:
        # PEFT quotes this where `target_modules` names the layer.
        return "frozen; leave it out with exclude_modules=r'.*semantic_encoder.*'"


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` has instructions that multiply it, float32 where it would be emulated or is unknown."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "xpu":
        return torch.bfloat16 if torch.xpu.is_bf16_supported() else torch.float32
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() in NARROW_KERNELS:
        return torch.float32
    found: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(found.get(name) for name in BFLOAT16_INSTRUCTIONS) else torch.float32


def build_transformer(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder's layers in `dtype`, with an attention of their own: the language model's may need half precision."""
    try:
        encoder = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
    except ValueError:  # an architecture without SDPA
        encoder = AutoModel.from_config(config, attn_implementation="eager", dtype=dtype)
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Linear:
            encoder.set_submodule(name, FrozenLinear(module))
    return encoder


class SemanticEncoder(nn.Module):
    """The frozen encoder and its fingerprints.

    Args:
        config: a SemToken configuration; `encoder_config`, `encoder_dtype`, `encoder_window`, `encoder_overlap`,
            `fingerprint_radius` and `vocab_size` are read.
    """

    def __init__(self, config: Any):
        super().__init__()
        encoder_config = copy.copy(config.encoder_config)
        encoder_config.vocab_size = config.vocab_size  # the encoder reads the model's own ids
        self.window, self.overlap = config.encoder_window, config.encoder_overlap
        self.width = encoder_config.hidden_size
        self.radius = config.fingerprint_radius
        self.is_static = encoder_config.model_type == SemTokenStaticEncoderConfig.model_type
        self.chosen_dtype = "float32" if self.is_static else config.encoder_dtype
        try:
            static = StaticEncoder(encoder_config) if self.is_static else None
            # In the dtype that the configuration records, which it keeps; `freeze` turns it into that of its device.
            self.encoder: Any = static or build_transformer(encoder_config, encoder_config.dtype or torch.float32)
        except Exception as error:  # of whatever kind its sizes lead to
            raise ValueError(f"`encoder_config` makes no encoder: {type(error).__name__}: {error}") from error
        self.freeze()

    def check_unchanged(self, config: Any) -> None:
        """Raise ValueError if a field that only making the encoder reads was changed in its configuration since."""
        made = {"encoder_window": self.window, "encoder_overlap": self.overlap, "fingerprint_radius": self.radius}
        if not self.is_static:
            made["encoder_dtype"] = self.chosen_dtype
        for name, value in made.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"`{name}` is read when a model is loaded, so {getattr(config, name)!r} has no effect now: set "
                    f"it back to {value!r}, or pass it to `from_pretrained`"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers or the table, now."""
        return self.encoder.get_input_embeddings().weight.dtype

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype that the configuration means on `device`."""
        return native_dtype(device) if self.chosen_dtype == "auto" else getattr(torch, self.chosen_dtype)

    def freeze(self) -> SemanticEncoder:
        """Evaluation mode, no gradients, the encoder's own dtype; `from_pretrained` undoes all three."""
        super().train(False)
        self.encoder.to(self.dtype_on(self.encoder.get_input_embeddings().weight.device))
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
        # `model.half()` and `model.to(dtype)` move the encoder but leave it in its own dtype, that of its device.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point():
                return moved
            dtype = self.dtype_on(moved.device)
            return moved if moved.dtype == dtype else tensor.to(moved.device, dtype)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def count_windows(self, layout: TokenLayout) -> Tensor:
        """Encoder windows of a stream, for `forward`: int64 [] on the device; negative where any needs padding."""
        if self.is_static:
            return layout.lengths.new_zeros(())
        counts = self._windows_of_segments(layout)
        is_padded = ((counts > 0) & (layout.lengths < self.window)).any()
        return torch.where(is_padded, -counts.sum(), counts.sum())

    @torch.no_grad()
    def forward(self, input_ids: Tensor, layout: TokenLayout, windows: int | None = None) -> Tensor:
        """Fingerprints of the stream.

        Args:
            input_ids: int64 [N], token ids of the stream.
            layout: its segments.
            windows: what `count_windows` says, if the host knows it; None: ask, which waits for the device.

        Returns:
            float32 [N, D] of unit norm; zero in segments where nothing may merge.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            if self.is_static:
                fingerprints = input_ids.new_empty((len(input_ids), self.width), dtype=torch.float32)
                return self._smooth(lambda part: self.encoder.embeddings(input_ids[part]), fingerprints, layout)
            states = self._encode_windows(input_ids, layout, windows)
            return self._smooth(lambda part: states[part], states, layout)

    def _windows_of_segments(self, layout: TokenLayout) -> Tensor:
        """int64 [S]: as few windows as cover a segment, none where nothing may merge."""
        mergeable = torch.zeros_like(layout.lengths).index_add_(0, layout.segment, layout.mergeable.long())
        stride = self.window - self.overlap
        return torch.where(mergeable > 0, 1 + (layout.lengths - self.window).clamp(min=0).add(stride - 1) // stride, 0)

    def _encode_windows(self, input_ids: Tensor, layout: TokenLayout, windows: int | None) -> Tensor:
        """States float32 [N, D]; zero in segments where nothing may merge."""
        signed = int(self.count_windows(layout)) if windows is None else windows
        # One row more, for what is read twice or is padding.
        states = torch.zeros((len(input_ids) + 1, self.width), dtype=torch.float32, device=input_ids.device)
        counts, total = self._windows_of_segments(layout), abs(signed)
        size = windows_per_call(total, self.window, input_ids.device)
        for first in range(0, total, size):
            number = torch.arange(first, first + size, device=input_ids.device)
            tokens, owned, valid = self._place_windows(number, counts, layout)
            found = self._encode(input_ids[tokens], valid if signed < 0 else None)
            states.index_copy_(0, tokens.where(owned, len(input_ids)).flatten(), found.flatten(0, 1).to(states))
        return states[:-1]

    def _place_windows(self, number: Tensor, counts: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of windows `number` [K] of the stream, which of them take their state there, and which are no padding.

        Returns:
            int64 [K, W], bool [K, W], bool [K, W]. Windows beyond the last repeat it and own nothing.
        """
        length, stride = self.window, self.window - self.overlap
        ends = counts.cumsum(0)
        known = number.minimum(ends[-1] - 1)
        segment = torch.searchsorted(ends, known, right=True)
        last = (counts[segment] - 1)[:, None]
        place = (known - ends[segment])[:, None] + last + 1
        tokens_there = layout.lengths[segment][:, None]
        # The last window ends with its segment, so only segments shorter than a window need padding.
        last_start = (tokens_there - length).clamp(min=0)
        offset = torch.minimum(place * stride, last_start) + torch.arange(length, device=number.device)
        valid = offset < tokens_there
        # The owner is the window whose middle is nearest: by stride, except that the last one is shifted back.
        owner = ((offset - self.overlap // 2).clamp(min=0) // stride).minimum((last - 1).clamp(min=0))
        owner = torch.where(2 * offset >= owner * stride + last_start + length, last, owner)
        owned = (owner == place) & valid & (number == known)[:, None]
        return layout.starts[segment][:, None] + offset.where(valid, 0), owned, valid

    def _encode(self, windows: Tensor, valid: Tensor | None) -> Tensor:
        """Last hidden states [K, W, D] of windows int64 [K, W]; `valid` bool [K, W], None without padding."""
        # Embeddings and not ids: RoBERTa would take an id that equals its padding id for padding.
        embeds = self.encoder.get_input_embeddings()(windows)
        mask, config = valid, self.encoder.config
        # Layers with a window of their own need a mask each, which Transformers makes of two dimensions alone.
        has_one_mask = config._attn_implementation == "sdpa" and getattr(config, "sliding_window", None) is None
        if valid is not None and has_one_mask:
            # Ready to be added: of two dimensions, Transformers would wait for the device to see whether it is needed.
            mask = torch.zeros_like(valid, dtype=embeds.dtype).masked_fill_(~valid, torch.finfo(embeds.dtype).min)
            mask = mask[:, None, None].expand(-1, 1, valid.shape[1], -1)
        elif valid is not None:
            mask = valid.long()
        return self.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state

    def _smooth(self, states: Callable[[slice], Tensor], into: Tensor, layout: TokenLayout) -> Tensor:
        """`into` [N, D], filled with the unit means around each token step by step; `states` may read from it."""
        before = into[:0]
        for start in range(0, len(into), TOKENS_PER_STEP):
            low, stop = start - len(before), min(start + TOKENS_PER_STEP, len(into))
            high = min(stop + self.radius, len(into))
            around = torch.cat([before, states(slice(start, high)).to(into)])
            means = self._running_mean(around, layout.segment[low:high])
            into[start:stop] = F.normalize(means[start - low : stop - low], dim=-1)
            before = around[max(0, stop - low - self.radius) : stop - low]
        return into

    def _running_mean(self, states: Tensor, segment: Tensor) -> Tensor:
        """Mean over +-radius tokens of the same segment, by shifted sums: exact whatever lies around the segment."""
        if self.radius == 0 or len(states) == 0:
            return states
        total, count = states.clone(), torch.ones_like(segment)
        for shift in range(1, min(self.radius, len(states) - 1) + 1):
            same = segment[shift:] == segment[:-shift]
            total[:-shift] += states[shift:] * same[:, None]
            total[shift:] += states[:-shift] * same[:, None]
            count[:-shift] += same
            count[shift:] += same
        return total / count[:, None]


def windows_per_call(total: int, window: int, device: torch.device) -> int:
    """Windows of every call of a stream, all of one shape: on a CPU without waste, elsewhere always the same."""
    calls = -(-total // WINDOWS_PER_CALL)
    if device.type != "cpu" or calls == 0:
        return WINDOWS_PER_CALL
    return min(WINDOWS_PER_CALL, max(-(-FEWEST_TOKENS_PER_CALL // window), -(-total // calls)))


__all__ = ["SemanticEncoder", "StaticEncoder"]
