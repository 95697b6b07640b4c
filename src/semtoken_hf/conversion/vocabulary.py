"""The encoder on the language model's vocabulary: the text of every token, and the encoder's embedding of that text.

- Each token's text is split with the encoder's own tokenizer; its input embedding is the mean of the pieces'
  embeddings. The encoder then reads the language model's ids one to one.
- Token frequency is read off the order in which BPE learned its merges: the training text is rarely at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tokenizers import models
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..tokenization_semtoken_fast import added_markup

# Put before a token while decoding it, since decoders strip the space at the start of a text.
ANCHOR = "a"
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every single token, by id.

    Args:
        tokenizer: a fast tokenizer; byte-level (`Ġ`) or SentencePiece-style (`▁`, `<0x0A>`).

    Returns:
        One string per id, 0 .. largest id, with its leading space. Empty for special and added tokens, but not for
        added white space, for ids that do not exist, and for bytes that are no character by themselves.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    markup = added_markup(tokenizer)
    texts = []
    for index in range(max(tokenizer.get_vocab().values()) + 1):
        token = tokenizer.backend_tokenizer.id_to_token(index)
        if token is None or index in markup:
            texts.append("")
            continue
        text = decoder.decode([ANCHOR, token])[len(ANCHOR) :] if decoder is not None else token
        texts.append("" if UNDECODABLE in text else text)
    return texts


def digit_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens with a decimal digit in their text, sorted."""
    return [i for i, text in enumerate(token_texts(tokenizer)) if any(c.isdecimal() for c in text)]


def rare_token_ids(tokenizer: PreTrainedTokenizerBase, share: float) -> list[int]:
    """Ids of the rarest `share` of the ordinary tokens, by `frequency_order`, sorted.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], got {share!r}")
    order = frequency_order(tokenizer)
    return sorted(order[len(order) - int(share * len(order)) :])


def frequency_order(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the ordinary tokens (neither special nor added), from frequent to rare.

    BPE merges the most frequent pair first, so the order of its merges stands for the order of frequency; tokens
    that no merge makes, the alphabet, come first. Ids alone would not do: SentencePiece puts `,` and `e` last.
    Other models go by id.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    learned: dict[str, int] = {}
    for place, merge in enumerate(model.get("merges", [])):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        learned.setdefault(left + right, place)
    added = tokenizer.added_tokens_decoder
    ordinary = {token: i for token, i in tokenizer.get_vocab().items() if i not in added}
    return sorted(ordinary.values(), key=_rank_key({i: learned.get(t, -1) for t, i in ordinary.items()}))


def _rank_key(place: dict[int, int]) -> Callable[[int], tuple[int, int]]:
    return lambda index: (place[index], index)


def transplant_embeddings(
    lm_tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase,
    encoder_embedding_weight: Tensor,
    vocab_size: int | None = None,
) -> Tensor:
    """Input embeddings of the encoder, moved onto the vocabulary of the language model.

    Args:
        lm_tokenizer: fast tokenizer of the language model.
        encoder_tokenizer: fast tokenizer of the encoder.
        encoder_embedding_weight: [V_encoder, D].
        vocab_size: V_lm, rows of the result; larger than the tokenizer: padded with the unknown token's embedding.
            None: the tokenizer's.

    Returns:
        float32 [V_lm, D]: the mean of the pieces' embeddings of each token. White space, which the encoder never
        reads, gets its separator; special tokens and lone bytes get its unknown token.

    Raises:
        ValueError: the encoder's tokenizer has no unknown token.
    """
    unknown = encoder_tokenizer.unk_token_id
    if unknown is None:
        raise ValueError("the encoder's tokenizer has no unknown token to stand for special tokens and lone bytes")
    blank = encoder_tokenizer.sep_token_id
    pieces = [
        ids or [unknown if blank is None or not text else blank]
        for text, ids in zip(*_split_texts(lm_tokenizer, encoder_tokenizer), strict=True)
    ]
    vocab_size = len(pieces) if vocab_size is None else vocab_size
    pieces = pieces[:vocab_size] + [[unknown]] * (vocab_size - len(pieces))
    flat = torch.tensor([i for ids in pieces for i in ids])
    offsets = torch.tensor([0] + [len(ids) for ids in pieces[:-1]]).cumsum(0)
    weight = encoder_embedding_weight.detach().cpu().float()
    return F.embedding_bag(flat, weight, offsets, mode="mean")


def _split_texts(
    lm_tokenizer: PreTrainedTokenizerBase, encoder_tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]]]:
    """The text of each token of the language model and its pieces in the encoder's vocabulary."""
    texts = token_texts(lm_tokenizer)
    pieces = encoder_tokenizer(texts, add_special_tokens=False)["input_ids"]
    split_continuation = _continuation_splitter(encoder_tokenizer)
    if split_continuation is None:
        return texts, pieces
    unknown = encoder_tokenizer.unk_token_id
    for index, text in enumerate(texts):
        # Lower case without a space continues a word: "##ing", not "ing". Mean cosine of 300 WikiText sentences with
        # the original MiniLM: 0.51 so, 0.47 without (8k BPE); 0.88, 0.87 (24k BPE trained on that text).
        if text[:1].islower():
            continued = split_continuation(text)
            if unknown not in continued:
                pieces[index] = continued
    return texts, pieces


def _continuation_splitter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]] | None:
    """A function from a text that begins inside a word to its WordPiece ids; None for other tokenizers."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.WordPiece) or backend.normalizer is None or backend.pre_tokenizer is None:
        return None
    prefix, unknown = backend.model.continuing_subword_prefix, backend.model.unk_token
    inside = {p[len(prefix) :]: i for p, i in tokenizer.get_vocab().items() if p.startswith(prefix) and p != prefix}
    # A WordPiece of the continuation pieces alone, without their prefix: they then match from the first character.
    first = models.WordPiece(
        {**inside, unknown: tokenizer.unk_token_id}, unk_token=unknown, continuing_subword_prefix=""
    )

    def split(text: str) -> list[int]:
        words = [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
        parts = [first.tokenize(word) if n == 0 else backend.model.tokenize(word) for n, word in enumerate(words)]
        return [piece.id for part in parts for piece in part]

    return split


__all__ = [
    "digit_token_ids",
    "frequency_order",
    "rare_token_ids",
    "token_texts",
    "transplant_embeddings",
]
