"""A chat of several turns: each turn compresses what is new, and the cache keeps the slots of the earlier ones.

python examples/chat.py --checkpoint "$(bash scripts/reference_model.sh minilm)"    # SmolLM2-135M-Instruct
python examples/chat.py --checkpoint llama-3.2-1b-semtoken --document report.txt
"""

# %% [markdown]
# # A chat about a long text
# The cache that `generate` returns is handed to the next call. Slots that it holds stay bit for bit as they are; only
# the new turn is planned, so later turns cost what they add.

# %%
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
# About the beginning of the document; about what follows; about the beginning again, which only the cache still holds.
QUESTIONS = [
    "Where did Sherwood and Applegarth dine?",
    "What instrument does Applegarth play?",
    "And where did they dine together?",
]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a SemToken checkpoint")
parser.add_argument("--document", type=Path, default=ROOT / "scripts" / "quickstart_chapter.txt")
parser.add_argument("--questions", nargs=3, metavar="QUESTION", default=QUESTIONS, help="one a turn")
parser.add_argument("--max-new-tokens", type=int, default=24)
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=torch.float32)
if tokenizer.chat_template is None:  # a base model, such as the one that ships
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
document = options.document.read_text(encoding="utf-8").strip()
third = len(document) // 3
TURNS = [
    f"{document[:third]}\n\n{options.questions[0]}",
    f"{document[third : 2 * third]}\n\n{options.questions[1]}",
    options.questions[2],
]

# %% [markdown]
# ## One turn
# `protect_template=True` adds `protected_mask`: role names and markers keep slots of their own, and only the messages'
# own text may merge. The new turn is put behind the tokens that were read and generated, since a reply that is decoded
# and encoded again may come out as other tokens. It is cut out of a rendering with two short turns before it, so that a
# template that opens every chat with a system text opens only the first turn with it.


# %%
PAST = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]


def encode_turn(text: str, is_first: bool) -> Any:
    """input_ids and protected_mask, int64 [1, t], of a user's turn."""
    past = [] if is_first else PAST
    message = {"role": "user", "content": text}
    new = tokenizer.apply_chat_template(
        [*past, message], add_generation_prompt=True, protect_template=True, return_tensors="pt"
    )
    before = len(tokenizer.apply_chat_template(past)["input_ids"]) if past else 0
    return {name: new[name][:, before:] for name in ("input_ids", "protected_mask")}


def turn(said: torch.Tensor, cache: Any, text: str) -> tuple[torch.Tensor, Any]:
    """Tokens int64 [1, T] so far and the cache after the reply."""
    new = encode_turn(text, is_first=cache is None)
    tokens = torch.cat([said, new["input_ids"]], dim=1)
    protected = torch.cat([torch.zeros_like(said), new["protected_mask"]], dim=1)
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        protected_mask=protected,
        past_key_values=cache,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    reply = tokenizer.decode(out.sequences[0, tokens.shape[1] :], skip_special_tokens=True).strip()
    print(f"\nuser: {text if len(text) < 90 else text[:40] + ' ... ' + text[-40:]!r}\nassistant: {reply!r}")
    return out.sequences, out.past_key_values


# %%
said, cache = torch.empty((1, 0), dtype=torch.long), None
for text in TURNS:
    said, cache = turn(said, cache, text)
    tokens, slots = cache.original_lengths.item(), cache.compressed_lengths.item()
    print(f"  {tokens:,} tokens in {slots:,} slots ({tokens / slots:.2f}x), {cache.memory_bytes():,} bytes of KV cache")

# %% [markdown]
# The last turn is shorter than `min_prompt_length` (256) and stays whole. What the model generates stays whole, too,
# unless `model.config.recompress_every` is set.
