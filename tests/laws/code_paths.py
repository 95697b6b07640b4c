"""Every code path through a model: a ragged batch goes in, what the laws compare comes out. For plain models, too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

from semtoken_hf import SemTokenCache
from tests.fixtures.tiny import LLAMA, VOCAB_SIZE, WITH_WINDOWS, left_padded, plain_twin, random_ids, tiny_model

STEPS = 5
# Generated tokens that are read again at once, and a run in which that happens once.
RECOMPRESS_EVERY, LONG_STEPS = 12, 19
# Of the model under test, which are no parameters of the family.
OWN_PARAMETERS = ("semantic_encoder", "learned_merger")


@dataclass
class Outcome:
    """What a code path came to, for B prompts of T columns and R = B x copies results.

    Attributes:
        by_row: [R, ...] each; "tokens" int64 [R, n] and "logits" [R, n, V] of generated text.
        by_token: [B, T, ...] each, aligned with the prompts.
        sums: what adds up over rows.
        others: compared as a whole only.
        cache: the one that was filled, if any.
    """

    by_row: dict[str, Tensor] = field(default_factory=dict)
    by_token: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    cache: Any = None

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, keys and values included."""
        named = {**self.by_row, **self.by_token, **self.sums, **self.others}
        for number, layer in enumerate(self.cache.layers if self.cache is not None else ()):
            named |= {f"keys {number}": layer.keys, f"values {number}": layer.values}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class CodePath:
    """A way to run a model.

    Attributes:
        run: model, ids [B, T], mask [B, T], further arguments of the call -> `Outcome`.
        copies: results of every prompt.
        is_decoding: whether it generates; what follows the prefill cannot know how slots were merged.
        compresses: False where the plain model runs whatever the configuration says.
        is_drafting: one repeating prompt, on which drafts succeed.
        samples: whether chance decides.
    """

    run: Callable[..., Outcome]
    copies: int = 1
    is_decoding: bool = True
    compresses: bool = True
    is_drafting: bool = False
    samples: bool = False

    def rows(self) -> list[Tensor]:
        """Prompts int64 [n] each: long, middle and too short to be compressed; special ids stand inside."""
        if self.is_drafting:
            return [random_ids(1, 15, 5)[0].repeat(4)]
        rows = [random_ids(1, n, n)[0] for n in (60, 37, 11)]
        rows[0][31], rows[1][17] = LLAMA["eos_token_id"], LLAMA["bos_token_id"]
        return rows

    def batch(self, rows: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All of them, or these, every row behind some padding."""
        return tuple(torch.nn.functional.pad(t, (4, 0)) for t in left_padded(rows or self.rows()))


def generate(model: Any, ids: Tensor, mask: Tensor, **arguments: Any) -> Outcome:
    """No end of sequence, so that every row has all its steps."""
    torch.manual_seed(3)
    steps = arguments.pop("steps", STEPS)
    arguments = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **arguments}
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, output_scores=True, **arguments
    )
    by_row, others = {"tokens": out.sequences[:, ids.shape[1] :]}, {"scores": torch.stack(out.scores, 1)}
    logits = torch.stack(out.logits, 1)
    if arguments.get("num_beams", 1) > 1:
        # Logits are of the beams as they ran, not of the sequences that won.
        by_row["sequences_scores"], others["logits"] = out.sequences_scores, logits
    else:
        by_row["logits"] = logits
    return Outcome(by_row, others=others, cache=out.get("past_key_values"))


def generating(**fixed: Any) -> Callable[..., Outcome]:
    return functools.partial(generate, **fixed)


def all_logits(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **own)
    # Padding reads nothing that means anything.
    return Outcome(
        by_token={"logits": out.logits * mask[..., None]}, others={"raw": out.logits}, cache=out.past_key_values
    )


def kept_logits(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, logits_to_keep=3, **own)
    return Outcome({"logits": out.logits}, others={"span_ids": out.get("span_ids")}, cache=out.past_key_values)


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Two runs of labels, counted from the end, so that padding does not move them."""
    place = torch.arange(ids.shape[1], 0, -1)
    return ids.where(((place <= 5) | ((place > 24) & (place <= 30))) & (mask != 0), -100)


def read_by_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """bool [B, T]: tokens whose logits `labels_of` scores."""
    return torch.nn.functional.pad(labels_of(ids, mask)[:, 1:] != -100, (0, 1)) & (mask != 0)


def labels(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels_of(ids, mask), num_items_in_batch=1, **own)
    readable = out.logits.masked_fill(~read_by_labels(ids, mask)[..., None], 0)
    others = {"raw": out.logits, "span_ids": out.get("span_ids")}
    return Outcome({}, {"logits": readable}, {"loss": out.loss}, others, out.past_key_values)


def training_step(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    model.train()
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=labels_of(ids, mask), num_items_in_batch=1, **own).loss
    loss.backward()
    model.eval()
    gradients: dict[str, list[Tensor]] = {"family": [], "merger": []}
    for name, parameter in model.named_parameters():
        if "semantic_encoder" not in name:
            kind = "merger" if "learned_merger" in name else "family"
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[kind].append(gradient.detach().clone().flatten())
    sums = {f"gradients of the {kind}": torch.cat(g) for kind, g in gradients.items() if g}
    return Outcome(sums={"loss": loss.detach(), **sums})


def new_cache(model: Any) -> Any:
    return (SemTokenCache if hasattr(model, "compress") else DynamicCache)(config=model.config)


def by_hand(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    """Greedy decoding with `forward` alone."""
    cache, column, tokens, logits = new_cache(model), ids, [], []
    for _ in range(STEPS):
        with torch.no_grad():
            out = model(column, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **own)
        logits.append(out.logits[:, -1].clone())
        out.logits[:, -1, LLAMA["eos_token_id"]] = -torch.inf
        column = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(column)
        mask = torch.cat([mask, torch.ones_like(column)], 1)
    return Outcome({"tokens": torch.cat(tokens, 1), "logits": torch.stack(logits, 1)}, cache=cache)


def second_turn(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What each row says next: half of its own tokens, backwards."""
    return [row[real.bool()].flip(0)[: int(real.sum()) // 2] for row, real in zip(ids, mask, strict=True)]


def chat(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    """Two turns on the cache that the first one returned; rows whose turns differ are padded inside."""
    first = generate(model, ids, mask, **own)
    answer = first.by_row["tokens"]
    turn, turn_mask = left_padded(second_turn(ids, mask))
    ids, mask = torch.cat([ids, answer, turn], 1), torch.cat([mask, torch.ones_like(answer), turn_mask], 1)
    second = generate(model, ids, mask, past_key_values=first.cache, **own)
    second.by_row |= {f"first {name}": value for name, value in first.by_row.items()}
    return second


def recompressed(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    """Generated text is read again into merged slots."""
    with configured(model, recompress_every=RECOMPRESS_EVERY):
        return generate(model, ids, mask, steps=LONG_STEPS, **own)


@contextmanager
def configured(model: Any, **fields: Any) -> Iterator[None]:
    """Other fields of the configuration for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fields.items():
            patch.setattr(model.config, name, value, raising=False)
        yield


@functools.cache
def assistant_of(family: str, dtype: torch.dtype) -> Any:
    # Transformers 5.17 cannot take drafts back from a plain model whose layers all forget: this window is never full.
    window = {"sliding_window": 4096} if family in WITH_WINDOWS else {}
    return plain_twin(tiny_model(1, family=family, num_hidden_layers=1, **window)).to(dtype)


def assisted(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    family = model.config.model_type.removeprefix("semtoken_")
    return generate(model, ids, mask, steps=8, assistant_model=assistant_of(family, model.dtype), **own)


@functools.cache
def number_tokenizer() -> PreTrainedTokenizerFast:
    """Its words are the ids themselves."""
    backend = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCAB_SIZE)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def text_pipeline(model: Any, ids: Tensor, mask: Tensor, **own: Any) -> Outcome:
    texts = [" ".join(f"<{i}>" for i in row[real.bool()].tolist()) for row, real in zip(ids, mask, strict=True)]
    pipe = pipeline("text-generation", model=model, tokenizer=number_tokenizer())
    steps = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    out = pipe(texts, batch_size=len(texts), return_tensors=True, **steps, **own)
    return Outcome({"tokens": torch.tensor([row[0]["generated_token_ids"][-STEPS:] for row in out])})


CODE_PATHS: dict[str, CodePath] = {
    "all logits": CodePath(all_logits, is_decoding=False, compresses=False),
    "kept logits": CodePath(kept_logits, is_decoding=False),
    "labels": CodePath(labels, is_decoding=False),
    "training step": CodePath(training_step, is_decoding=False),
    "by hand": CodePath(by_hand),
    "greedy": CodePath(generate),
    "sampling": CodePath(generating(do_sample=True, temperature=0.8, top_k=50), samples=True),
    "beams": CodePath(generating(num_beams=3)),
    "beams with returns": CodePath(generating(num_beams=3, num_return_sequences=2), copies=2),
    "sampled returns": CodePath(generating(do_sample=True, num_return_sequences=2), copies=2, samples=True),
    "prompt lookup": CodePath(generating(prompt_lookup_num_tokens=3, steps=8), is_drafting=True),
    "assistant": CodePath(assisted, is_drafting=True),
    "chunked prefill": CodePath(generating(prefill_chunk_size=7)),
    "chat": CodePath(chat),
    "recompressed": CodePath(recompressed),
    "pipeline": CodePath(text_pipeline),
    "without cache": CodePath(generating(use_cache=False), compresses=False),
}


@contextmanager
def coupled_draws(copies: int) -> Iterator[None]:
    """Draws that depend on the step and the copy alone, so that rows can be compared with single prompts."""
    numbers = iter(torch.rand(100, copies, generator=torch.Generator().manual_seed(11)))

    def draw(probabilities: Tensor, num_samples: int, **_: Any) -> Tensor:
        number = next(numbers).repeat(len(probabilities) // copies)[:, None]
        return (probabilities.cumsum(-1) < number).sum(-1, keepdim=True).clamp(max=VOCAB_SIZE - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        yield
