"""Retrieval-augmented generation: several passages, and a question that decides which of them stay whole.

python examples/rag.py --checkpoint "$(bash scripts/reference_model.sh minilm)"    # SmolLM2-135M-Instruct
python examples/rag.py --checkpoint llama-3.2-1b-semtoken --passages retrieved.txt --question "Who built it?"
"""

# %% [markdown]
# # Passages and a question
# A retriever is never sure, so most of the passages are beside the point. The model finds the question in the last turn
# of the user, and keeps the sentences that have to do with it whole.

# %%
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a SemToken checkpoint")
parser.add_argument("--passages", type=Path, default=Path(__file__).with_name("passages.txt"))
parser.add_argument("--question", default="Who cut the thick lens of a lighthouse into rings, and in which year?")
parser.add_argument("--target-ratio", type=float, default=4.0, help="tokens per slot (default 4)")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=torch.float32)
if tokenizer.chat_template is None:  # a base model, such as the one that ships
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
passages = options.passages.read_text(encoding="utf-8").strip().split("\n\n")

# %% [markdown]
# ## The chat
# The passages stand before the question in the user's turn; a turn of their own before it works, too.

# %%
messages = [{"role": "user", "content": "\n\n".join([*passages, options.question])}]
chat = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    return_query_mask=True,  # needed only where the checkpoint was converted without a chat template
    tokenizer_kwargs={"return_offsets_mapping": True},
    return_tensors="pt",
)
offsets = chat.pop("offset_mapping")[0]
rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

# %% [markdown]
# ## Which passages keep slots
# Without the question, at weight 0, the last passages keep all of the budget. The table counts slots.


# %%
def slots_of_passages(query_weight: float) -> list[tuple[int, int]]:
    """Tokens and slots of each passage, if the question weighs so much."""
    prompt = model.compress(**chat, target_ratio=options.target_ratio, query_weight=query_weight)
    counts = []
    for passage in passages:
        start = rendered.index(passage)
        inside = (offsets[:, 0] < start + len(passage)) & (offsets[:, 1] > start)
        counts.append((int(inside.sum()), len(prompt.span_ids[0, inside].unique())))
    return counts


# %%
print(
    f"question: {options.question}\n\n{'passage':<14}{'tokens':>8}" + "".join(f"{f'weight {w:g}':>12}" for w in (0, 1))
)
tables = [slots_of_passages(weight) for weight in (0.0, 1.0)]
for number, passage in enumerate(passages):
    title, tokens = passage.splitlines()[0], tables[0][number][0]
    print(f"{title[:13]:<14}{tokens:>8}" + "".join(f"{table[number][1]:>6} slots" for table in tables))
print(
    f"{'together':<14}"
    + f"{sum(t for t, _ in tables[0]):>8}"
    + "".join(f"{sum(s for _, s in t):>6} slots" for t in tables)
)

# %% [markdown]
# ## The answer
# The same inputs go into `generate`.


# %%
def answer(**how: object) -> str:
    tokens = model.generate(**chat, **how, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("\nplain:   ", answer(compression=False))
print("SemToken:", answer(target_ratio=options.target_ratio))
