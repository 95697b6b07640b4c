"""Summaries of documents of different lengths, in one batch: planned by the data loader, read without padding.

python examples/batch_summaries.py --checkpoint "$(bash scripts/reference_model.sh)"    # SmolLM2-135M-Instruct
python examples/batch_summaries.py --checkpoint llama-3.2-1b-semtoken --documents a.txt b.txt c.txt --workers 2
"""

# %% [markdown]
# # A ragged batch
# - The tokenizer plans: `return_span_ids=True` runs the encoder on the data loader's workers, off the model's device.
# - `attn_implementation="semtoken_varlen"` puts the rows one behind the other: no work and no memory for padding.

# %%
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a SemToken checkpoint")
parser.add_argument("--documents", nargs="+", type=Path, help="text files (default: pieces of a chapter)")
parser.add_argument("--target-ratio", type=float, default=2.4, help="tokens per slot (default 2.4)")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--workers", type=int, default=0, help="of the data loader (default 0: this process)")
parser.add_argument("--max-new-tokens", type=int, default=24)
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=True)
if options.documents:
    documents = [path.read_text(encoding="utf-8").strip() for path in options.documents]
else:
    chapter = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8").strip()
    documents = [chapter, chapter[: len(chapter) // 3], chapter[-len(chapter) // 4 :], chapter[: len(chapter) // 6]]


# %% [markdown]
# ## The data loader
# Padding is on the left, as `generate` needs it. What a worker plans is what the model would have planned.


# %%
def collate(texts: list[str]) -> Any:
    """input_ids, attention_mask and span_ids, all int64 [B, T]."""
    prompts = [f"{text}\n\nIn short:" for text in texts]
    return tokenizer(
        prompts, padding=True, return_tensors="pt", return_span_ids=True, target_ratio=options.target_ratio
    )


# Workers are started afresh: forked ones would share the threads of this process.
start = {"multiprocessing_context": "spawn"} if options.workers else {}
loader = DataLoader(documents, options.batch_size, collate_fn=collate, num_workers=options.workers, **start)

# %% [markdown]
# ## Summaries, and the memory of their cache
# `memory_bytes()` counts the keys and values that are held; `original_lengths` and `compressed_lengths` say for what.


# %%
def summarise(batch: Any, **how: Any) -> tuple[list[str], Any]:
    """Texts and the cache."""
    out = model.generate(
        **batch,
        **how,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    width = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True), out.past_key_values


# %%
def main() -> None:
    for batch in loader:
        texts, cache = summarise(batch)
        tokens, slots = cache.original_lengths.tolist(), cache.compressed_lengths.tolist()
        for text, n, m in zip(texts, tokens, slots, strict=True):
            print(f"{n:>6,} tokens in {m:>5,} slots: {text.strip()!r}")
        masks = {name: batch[name] for name in ("input_ids", "attention_mask")}
        plain = model.generate(**masks, compression=False, max_new_tokens=1, return_dict_in_generate=True)
        columns = batch["input_ids"].shape
        per_token = sum(
            layer.keys[0, :, :1].nbytes + layer.values[0, :, :1].nbytes for layer in plain.past_key_values.layers
        )
        print(f"KV cache of the prompts, plain and padded: {columns.numel() * per_token:,} bytes")
        print(f"KV cache of the slots, with the summaries:  {cache.memory_bytes():,} bytes")


if __name__ == "__main__":  # workers import this file
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=torch.float32, attn_implementation="semtoken_varlen"
    )
    main()
