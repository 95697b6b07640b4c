"""Models of known shapes with random weights made on the device, and real text to read: all that the parts need."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..configuration_semtoken_llama import SemTokenLlamaConfig
from ..modeling_semtoken_llama import SemTokenLlamaForCausalLM

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT, TEXT = ROOT / "model_cards" / "semtoken-llama-tiny", ROOT / "scripts" / "quickstart_chapter.txt"
# Of the tokenizer of CHECKPOINT, which the shapes' own vocabularies contain.
VOCAB_SIZE = 32000
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rope_theta",
)
SHAPES = {
    "tiny": (64, 128, 2, 2, 2, VOCAB_SIZE, 1e4),
    "tiny-gqa": (256, 512, 4, 4, 2, VOCAB_SIZE, 1e4),
    "llama-160m": (768, 3072, 12, 12, 12, VOCAB_SIZE, 1e4),
    "llama-1.1b": (2048, 5632, 22, 32, 4, VOCAB_SIZE, 1e4),
    "llama-2-7b": (4096, 11008, 32, 32, 32, VOCAB_SIZE, 1e4),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 5e5),
}
ENCODERS: dict[str, dict[str, Any] | None] = {
    "static": None,
    "transformer": {
        "model_type": "bert",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
}


def config_of(shape: str, encoder: str = "static", **fields: Any) -> SemTokenLlamaConfig:
    """Configuration of a named shape with the package's own compression defaults."""
    sizes: dict[str, Any] = dict(zip(FIELDS, SHAPES[shape], strict=True))
    theta = sizes.pop("rope_theta")
    return SemTokenLlamaConfig(
        **{
            **sizes,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "max_position_embeddings": 2**21,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "encoder_config": ENCODERS[encoder],
            **fields,
        }
    )


def build_model(
    shape: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    encoder: str = "static",
    attn_implementation: str = "sdpa",
    **fields: Any,
) -> Any:
    """A random SemToken Llama in evaluation mode.

    Args:
        shape: a name of `SHAPES`.
        device: where the weights are made.
        dtype: of the language model; the encoder is float32.
        encoder: "static" or "transformer", random as well: their plans cost what real ones cost, and mean nothing.
        fields: of the configuration.
    """
    torch.manual_seed(0)
    config = config_of(shape, encoder, **fields)
    with torch.device(device):
        model = SemTokenLlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        table = model.base_model.semantic_encoder.encoder.get_input_embeddings().weight.data
        # Random rows are nearly orthogonal: a direction that they share spreads the cosines out.
        table += torch.randn(1, table.shape[1]) * table.std()
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def weight_bytes(shape: str, bytes_per_value: int = 2) -> int:
    """Bytes of the language model's weights (an untied head included), by arithmetic."""
    hidden, inner, layers, heads, kv_heads, vocab, _ = SHAPES[shape]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads
    return bytes_per_value * (layers * (attention + 3 * hidden * inner) + 2 * vocab * hidden)


def kv_bytes(shape: str, positions: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values of so many positions, by arithmetic."""
    hidden, _, layers, heads, kv_heads, _, _ = SHAPES[shape]
    return 2 * bytes_per_value * layers * positions * hidden * kv_heads // heads


@cache
def _text_ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


def text_ids(length: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """int64 [1, length]: BOS and a chapter of running text, repeated, below `VOCAB_SIZE`."""
    text = _text_ids().roll(-start)
    ids = text.repeat(-(-length // len(text)))[None, :length].clone()
    ids[:, 0] = 1
    return ids.to(device)


def ragged_batch(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Left-padded prompts: ids and mask, int64 [B, max(lengths)]."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = text_ids(length, start=101 * row)[0]
        mask[row, width - length :] = 1
    return ids.to(device), mask.to(device)
