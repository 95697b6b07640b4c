"""Compressed prompts as prompt embeddings, the form that vLLM takes them in.

vLLM gives embeddings no positions but counts them 0..m-1, which is what `position_mode="compact"` means. It then runs
the plain model over them, with the weights of the SemToken checkpoint: the one that it was converted from, or after
`--trainable full` what `conversion.plain.export_plain` writes.

    vllm serve PLAIN_FOLDER --enable-prompt-embeds
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d @request.json

    prompt = export_prompt(model, tokenizer, text)
    json.dumps(prompt.to_request("PLAIN_FOLDER", max_tokens=100))  # request.json
    client.completions.create(model=..., prompt=None, extra_body={"prompt_embeds": prompt.to_base64()})
    LLM("PLAIN_FOLDER", enable_prompt_embeds=True).generate({"prompt_embeds": prompt.prompt_embeds})
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache_semtoken import SemTokenCache
from ..compression import CompressedPrompt

# What vLLM reads; it casts to the dtype that it runs the model in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of an encoding, for `compress`.
ENCODING_FIELDS = ("input_ids", "attention_mask", "span_ids", "protected_mask", "query_mask")


@dataclass(frozen=True)
class ExportedPrompt:
    """One compressed prompt.

    Attributes:
        prompt_embeds: [M, H] on the CPU, one row a slot.
        original_length: tokens that it stands for.
        budget_met: as in `CompressedPrompt`.
    """

    prompt_embeds: Tensor
    original_length: int
    budget_met: bool

    def to_base64(self) -> str:
        """See `encode_prompt_embeds`."""
        return encode_prompt_embeds(self.prompt_embeds)

    def to_request(self, model: str, **fields: Any) -> dict[str, Any]:
        """A body for /v1/completions; `fields` are those of the API, such as `max_tokens`."""
        return {"model": model, **fields, "prompt_embeds": self.to_base64()}


def export_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict] | Mapping[str, Any],
    target_ratio: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportedPrompt:
    """Compress one prompt for an engine.

    Args:
        model: a SemToken model, with or without its head.
        tokenizer: its tokenizer.
        prompt: text; or messages, for the chat template with a generation prompt; or what the tokenizer made of
            either, with `span_ids`, `protected_mask` and `query_mask` as in `model.compress`.
        target_ratio: tokens per slot, instead of the configuration's.
        dtype: of the embeddings: float32, bfloat16 or float16; None: the model's.

    Raises:
        ValueError: several prompts, an empty one, or a model that reads merged slots through an adapter.
    """
    encoding: Any = prompt
    if isinstance(prompt, str):
        encoding = tokenizer(prompt, return_tensors="pt")
    elif not isinstance(prompt, Mapping):
        encoding = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    return export_pieces(model, [encoding], target_ratio, dtype)


def export_pieces(
    model: Any,
    pieces: list[Mapping[str, Any]],
    target_ratio: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportedPrompt:
    """Compress the encodings of one prompt's pieces, each behind the slots of those before it.

    Args:
        model, target_ratio, dtype: as in `export_prompt`.
        pieces: see `chat_turns.chat_pieces`; a short one stays whole.

    Raises:
        ValueError: as in `export_prompt`.
    """
    check_config(model.config)
    cache, is_met, tokens = SemTokenCache(), True, 0
    embeds: list[Tensor] = []
    for piece in pieces:
        fields = {name: piece[name].to(model.device) for name in ENCODING_FIELDS if name in piece}
        if not fields["input_ids"].numel():
            raise ValueError("the prompt is empty")
        with torch.no_grad():
            prompt = model.compress(**fields, target_ratio=target_ratio, position_mode="compact", past_key_values=cache)
        embeds.append(prompt_embeds_of(prompt, dtype, start=sum(map(len, embeds))))
        cache.record(prompt.slot_lengths, fields["input_ids"].shape[1], prompt.is_merged, prompt.is_padded)
        tokens += int(prompt.original_lengths)
        is_met &= bool(prompt.budget_met)
    return ExportedPrompt(torch.cat(embeds), tokens, is_met)


def check_config(config: Any) -> None:
    """Raise ValueError if the engine's plain model would read the slots differently."""
    if config.adapter_subfolder is not None:
        raise ValueError(
            "this checkpoint reads merged slots through an adapter, which the engine's plain model has not: load it "
            "with `adapter_subfolder=None`, at a loss of quality, or adapt with `--trainable merger` or `full`"
        )


def prompt_embeds_of(prompt: CompressedPrompt, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """The slots [M, H] of one prompt, on the CPU; `start`: slots before it.

    Raises:
        ValueError: several rows, or positions other than start..start+m-1.
    """
    rows, slots = prompt.position_ids.shape
    if rows != 1:
        raise ValueError(f"prompts are exported one by one, got {rows} rows: the engine takes no padding")
    if not torch.equal(prompt.position_ids[0].cpu(), torch.arange(start, start + slots)):
        raise ValueError(
            "the slots carry original positions, and the engine counts 0..m-1: compress with `position_mode='compact'`"
        )
    return prompt.inputs_embeds[0].detach().to("cpu", dtype)


def encode_prompt_embeds(prompt_embeds: Tensor) -> str:
    """Embeddings [M, H] as vLLM's `prompt_embeds`: base64 of what `torch.save` writes.

    Raises:
        ValueError: another shape, nothing in it, or a dtype that vLLM refuses.
    """
    if prompt_embeds.ndim != 2 or not prompt_embeds.numel():
        raise ValueError(f"prompt embeddings must have the shape [slots, hidden], got {tuple(prompt_embeds.shape)}")
    if prompt_embeds.dtype not in DTYPES:
        raise ValueError(f"prompt embeddings must be one of {[*map(str, DTYPES)]}, got {prompt_embeds.dtype}")
    buffer = io.BytesIO()
    # A clone, since a view would be saved with its whole storage.
    torch.save(prompt_embeds.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_prompt_embeds(text: str | bytes) -> Tensor:
    """The tensor [M, H] that `encode_prompt_embeds` wrote, read as vLLM reads it.

    Raises:
        ValueError: not base64, or not of a tensor of two dimensions.
    """
    content = base64.b64decode(text, validate=True)
    try:
        tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"these bytes hold no tensor: {error}") from error
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise ValueError("these bytes hold no tensor of shape [slots, hidden]")
    return tensor


__all__ = [
    "ExportedPrompt",
    "check_config",
    "decode_prompt_embeds",
    "encode_prompt_embeds",
    "export_pieces",
    "export_prompt",
    "prompt_embeds_of",
]
