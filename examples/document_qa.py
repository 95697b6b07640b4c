"""Questions about a long document: the question decides which sentences stay whole.

python examples/document_qa.py --checkpoint "$(bash scripts/reference_model.sh minilm)"    # SmolLM2-135M-Instruct
python examples/document_qa.py --checkpoint llama-3.2-1b-semtoken --document report.txt --target-ratio 4
"""

# %% [markdown]
# # Questions about a long document
# The document is read at 2.4 tokens per slot. Whole sentences stay, those first that have most to do with the question;
# what lies between them merges. `query_weight=0` keeps the latest sentences instead.

# %%
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a SemToken checkpoint")
parser.add_argument("--document", type=Path, default=ROOT / "scripts" / "quickstart_chapter.txt")
parser.add_argument("--questions", nargs="+", metavar="QUESTION=ANSWER", help="about your own document")
parser.add_argument("--target-ratio", type=float, default=2.4, help="tokens per slot (default 2.4)")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=torch.float32)
document = options.document.read_text(encoding="utf-8").strip()
# Three cases: the question keeps the answer whole; it does not; the answer stays whole anyway, near the end.
QUESTIONS = [
    "Where did Sherwood, Linklater and Applegarth dine?=the Junior Carlton",
    "Who wrote 'The Adventures of a Younger Son'?=Trelawny",
    "How much does the man at St. Neots offer?=four thousand pounds",
]

# %% [markdown]
# ## The prompt
# `query_mask` says which tokens are the question's. In a chat the model finds them by itself (see `rag.py`); in another
# text it has to be told.


# %%
def encode(question: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and query_mask, all int64 [1, T]."""
    if tokenizer.chat_template is None:  # a base model
        text = f"{tokenizer.bos_token}{document}\n\nQuestion: {question}\nAnswer:"
    else:
        messages = [{"role": "user", "content": f"{document}\n\n{question} Answer in one short sentence."}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoding.pop("offset_mapping")
    return {**encoding, "query_mask": (offsets[..., 1] > text.rindex(question)).long()}


# %% [markdown]
# ## What became of the answer
# `compress` is the stage alone. Tokens between two bars share a slot.


# %%
def around(answer: str, encoding: dict[str, torch.Tensor], how: dict[str, Any], width: int = 14) -> str:
    """The tokens around the first place of the answer, with a bar between slots."""
    inputs = {name: encoding[name] for name in ("input_ids", "attention_mask")}
    slots = model.compress(**inputs, **how).span_ids[0].tolist()
    pieces = [tokenizer.decode([token]) for token in encoding["input_ids"][0].tolist()]
    place, end = "".join(pieces).find(answer), 0
    middle = next((n for n, piece in enumerate(pieces) if (end := end + len(piece)) > place), 0)
    shown = range(max(0, middle - width), min(len(pieces), middle + width))
    joined = "".join(("|" if slots[n] != slots[n - 1] else "") + pieces[n] for n in shown)
    return joined.replace("\n", " ")


# %% [markdown]
# ## Is the answer likelier?
# A text is right or wrong; the likelihood of the gold answer tells more. Labels say what is scored: the answer's tokens
# alone. They are read whole and the planner never sees them.


# %%
def answer_loss(encoding: dict[str, torch.Tensor], answer: str, **how: Any) -> float:
    """Nats per token of the gold answer."""
    ids = encoding["input_ids"]
    # Behind "Answer:" an answer begins with a space, in a turn of its own without.
    gap = " " if tokenizer.chat_template is None else ""
    target = tokenizer(gap + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs = torch.cat([ids, target], dim=1)
    labels = torch.cat([torch.full_like(ids, -100), target], dim=1)
    if "query_mask" in how:
        how["query_mask"] = torch.nn.functional.pad(how["query_mask"], (0, target.shape[1]))
    with torch.no_grad():
        return model(input_ids=inputs, labels=labels, **how).loss.item()


def written(encoding: dict[str, torch.Tensor], **how: Any) -> str:
    """What the model writes."""
    inputs = {name: encoding[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, **how, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# %%
losses: dict[str, list[float]] = {}
for pair in options.questions or QUESTIONS:
    question, answer = pair.rsplit("=", 1)
    encoding = encode(question)
    print(f"\n{question}  (gold answer: {answer})")
    ways = {
        "plain": {"compression": False},
        "the latest": {"target_ratio": options.target_ratio, "query_weight": 0.0},
        "SemToken": {"target_ratio": options.target_ratio, "query_mask": encoding["query_mask"]},
    }
    for name, how in ways.items():
        loss = answer_loss(encoding, answer, **how)
        losses.setdefault(name, []).append(loss)
        print(f"  {name:<18} {loss:6.2f} nats per token of the answer; writes: {written(encoding, **how)!r}")
        if name != "plain":
            print(f"{'':20} ...{around(answer, encoding, how)}...")

# %%
print("\nmean over the questions, nats per token of the gold answer")
for name, values in losses.items():
    print(f"  {name:<18} {sum(values) / len(values):6.2f}")
