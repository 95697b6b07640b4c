"""Tiny tokenizers of the kinds that Llama checkpoints have, and a WordPiece vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
VOCAB_SIZE = 420
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "ing", "##ing", "walk", "7", "."]
WORDS = ["the", "cat", "cats", "walk", "walking", "7"]


def bpe_model(first: list[str], words: list[str], last: Sequence[str] = (), **options) -> models.BPE:
    """A BPE that merges each word from left to right; ids of the merges lie between `first` and `last`."""
    tokens, merges = list(first), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return models.BPE(vocab={t: i for i, t in enumerate([*tokens, *last])}, merges=merges, **options)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3's: a byte-level alphabet, `Ġ` for a space."""
    return word_tokenizer(WORDS, ["ing", "Ing"])


def word_tokenizer(words: list[str], others: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a token for each word behind a space, and for `others` without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(bpe_model([*SPECIAL, *alphabet], ["Ġ" + word for word in words] + [*others]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: byte tokens, `▁` for a space, the single characters behind the merges."""
    letters = list("▁abcdefghijklmnopqrstuvwxyzI.,7é")
    backend = Tokenizer(
        bpe_model(
            SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)],
            ["▁" + word for word in WORDS] + ["ing", "Ing"],
            letters,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<s>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(backend)


def _finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    return tokenizer


TOKENIZERS = {"byte_level": byte_level_tokenizer, "metaspace": metaspace_tokenizer}


def edit_json(file: Path, **fields) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
