"""Tiny checkpoints in folders: a plain Llama and a BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .checkpoints import TOKENIZERS, VOCAB_SIZE, WORDPIECES, byte_level_tokenizer


@pytest.fixture(params=sorted(TOKENIZERS))
def lm_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The two kinds of tokenizer that Llama checkpoints have."""
    return TOKENIZERS[request.param]()


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    """A random BERT with a WordPiece tokenizer."""
    folder = tmp_path / "encoder"
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocab = {piece: i for i, piece in enumerate(WORDPIECES + letters + ["##" + x for x in letters if x != "s"])}
    BertTokenizerFast(vocab=vocab, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path):
    """A function that writes a random plain Llama and returns its folder."""

    def make(
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **fields,
    ) -> Path:
        folder = tmp_path / "llama"
        torch.manual_seed(2)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCAB_SIZE, **sizes, **ids, **fields}))
        model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
        return folder

    return make
