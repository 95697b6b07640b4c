"""The card as the repository will show it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

from .module_hashes import module_hashes, with_modules
from .selection import CARD, Selection

# For a checkpoint without a card: what can be said of any.
PLAIN_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- semtoken
- prompt-compression
- kv-cache
- long-context
---

# {name}

A language model (`{model_type}`) with [SemToken](https://arxiv.org/abs/2508.15190) inside its forward pass: by default
it reads a long prompt in {target_ratio:g} times fewer positions. Loading needs `transformers` and `torch`{needs}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(pipe(long_prompt, max_new_tokens=48)[0]["generated_text"])                     # compressed
print(pipe(long_prompt, max_new_tokens=48, compression=False)[0]["generated_text"])  # exactly the plain model
```
"""


def render_card(folder: Path, selection: Selection, repo_id: str) -> str:
    """The folder's card with the repository's name where it loads the folder, or a plain one; with the code's hashes.

    Raises:
        ValueError: the metadata at the top is no valid YAML, or no valid model index; or see `with_modules`.
    """
    if CARD in selection.files:
        text = selection.files[CARD].read_text(encoding="utf-8")
        own = rf"(from_pretrained\(\s*)([\"'])(?:[^\"'\n]*/)?{re.escape(folder.resolve().name)}/?\2"
        text = re.sub(own, lambda match: f"{match[1]}{match[2]}{repo_id}{match[2]}", text)
    else:
        config = selection.config
        facts = {"model_type": config["model_type"], "target_ratio": config["target_ratio"]}
        needs = ", and `peft`" if config.get("adapter_subfolder") else ""
        text = PLAIN_CARD.format(name=repo_id.split("/")[-1], repo_id=repo_id, needs=needs, **facts)
    text = with_modules(text, module_hashes(selection.files.values()))
    try:
        ModelCard(text)
    except Exception as error:  # the YAML parser's own, or what it found
        raise ValueError(f"the metadata of {CARD} is not valid: {error}") from error
    return text


__all__ = ["render_card"]
