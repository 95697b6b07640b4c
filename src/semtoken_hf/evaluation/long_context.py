"""Contexts longer than the model's positions: more text in the same slots, against the same slots of recent text."""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm.auto import tqdm

from .cells import load_model, load_tokenizer
from .configuration import EvaluationConfig
from .continuation import score_target
from .methods import METHODS, Compressed
from .tasks.sources import spread
from .texts import window_prompt

WINDOWS = 24
# Far spans have to hold more tokens than the default cap allows.
LONGEST_SPAN = 32


def measure_long_contexts(config: EvaluationConfig) -> list[dict[str, Any]]:
    """Perplexity of the same targets behind contexts of every length, in the slots that the model has positions for.

    SemToken reads the whole context with compact positions; the plain model reads the most recent part of it.

    Returns:
        One record a variant: title, length, slots, examples, nll, perplexity.
    """
    model, tokenizer = load_model(config.checkpoint, config.dtype), load_tokenizer(config.checkpoint)
    slots = model.config.max_position_embeddings - config.target_length
    text = config.read_haystack()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    lengths = [n for n in config.lengths if slots < n <= len(ids) - config.target_length]
    if not lengths:
        return []
    # Every target has the longest context before it.
    ends = list(range(max(lengths), len(ids) - config.target_length + 1, config.target_length))
    ends = spread(ends, min(1.0, config.fraction * WINDOWS / len(ends)))
    fields = {"position_mode": "compact", "max_span_length": LONGEST_SPAN}
    variants = [(f"the last {slots:,} tokens, plain", slots, METHODS["full"])]
    variants += [("SemToken, compact positions", n, Compressed("", fields=fields)) for n in lengths]
    records = []
    for title, length, method in tqdm(variants, desc="long contexts"):
        nll, held = 0.0, 0
        for end in ends:
            window = ids[end - length : end + config.target_length].clone()
            window[0] = tokenizer.bos_token_id
            prompt = window_prompt(end, window, length).to(model.device)
            prefill = method.read(model, prompt, slots)
            nll, held = nll + float(score_target(model, prefill, prompt.target).mean()), max(held, prefill.slots)
        mean = nll / len(ends)
        records.append(
            {
                "title": title,
                "length": length,
                "slots": held,
                "examples": len(ends),
                "nll": mean,
                "perplexity": math.exp(mean),
            }
        )
    return records
