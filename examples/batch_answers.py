"""Questions about documents of different lengths, in one batch: planned by the data loader, read without padding.

python examples/batch_answers.py --checkpoint "$(bash scripts/reference_model.sh minilm)"    # SmolLM2-135M-Instruct
python examples/batch_answers.py --checkpoint llama-3.2-1b-semtoken --documents a.txt b.txt --question "Who signed it?"
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
parser.add_argument("--question", help="about every document")
parser.add_argument("--target-ratio", type=float, default=2.4, help="tokens per slot (default 2.4)")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--workers", type=int, default=0, help="of the data loader (default 0: this process)")
parser.add_argument("--max-new-tokens", type=int, default=24)
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=True)
if tokenizer.chat_template is None:  # a base model, such as the one that ships
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
if options.documents:
    question = options.question or "What is this text about? Answer in one sentence."
    pairs = [(path.read_text(encoding="utf-8").strip(), question) for path in options.documents]
else:
    chapter = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8").strip()
    third = len(chapter) // 3
    pairs = [
        (chapter, "What musical instrument does Applegarth play?"),
        (chapter[: 2 * third], "Where did Sherwood, Linklater and Applegarth dine?"),
        (chapter[:third], "Where does Sherwood want to travel?"),
        (chapter[2 * third :], "Who entered the room at the end?"),
    ]


# %% [markdown]
# ## The data loader
# Padding is on the left, as `generate` needs it. What a worker plans is what the model would have planned.


# %%
def collate(pairs: list[tuple[str, str]]) -> Any:
    """input_ids, attention_mask and span_ids, all int64 [B, T]; each row is planned for its own question."""
    chats = [[{"role": "user", "content": f"{document}\n\n{question}"}] for document, question in pairs]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return tokenizer(
        prompts,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
        return_span_ids=True,
        target_ratio=options.target_ratio,
    )


# Workers are started afresh: forked ones would share the threads of this process.
start = {"multiprocessing_context": "spawn"} if options.workers else {}
loader = DataLoader(pairs, options.batch_size, collate_fn=collate, num_workers=options.workers, **start)

# %% [markdown]
# ## Answers, and the memory of their cache
# `memory_bytes()` counts the keys and values that are held; `original_lengths` and `compressed_lengths` say for what.


# %%
def answer(batch: Any, **how: Any) -> tuple[list[str], Any]:
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
    texts = tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts], out.past_key_values


# %%
def main() -> None:
    asked = iter(question for _, question in pairs)
    for batch in loader:
        texts, cache = answer(batch)
        masks = {name: batch[name] for name in ("input_ids", "attention_mask")}
        plain, plain_cache = answer(masks, compression=False)
        lengths = zip(cache.original_lengths.tolist(), cache.compressed_lengths.tolist(), strict=True)
        for text, plain_text, (tokens, slots) in zip(texts, plain, lengths, strict=True):
            print(f"{next(asked)}\n{tokens:>6,} tokens: {plain_text!r}\n{slots:>6,} slots:  {text!r}\n")
        per_token = sum(layer.keys[0, :, :1].nbytes + layer.values[0, :, :1].nbytes for layer in plain_cache.layers)
        padded = plain_cache.get_seq_length() * len(texts)
        print(f"KV cache of tokens, plain and padded: {padded * per_token:>12,} bytes")
        print(f"KV cache of slots, without padding:   {cache.memory_bytes():>12,} bytes")


if __name__ == "__main__":  # workers import this file
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=torch.float32, attn_implementation="semtoken_varlen"
    )
    main()
