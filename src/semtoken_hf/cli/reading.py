"""One prompt through a checkpoint, for `semtoken generate`: what is read, how it went, and what was written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..cache_semtoken import cache_bytes
from ..conversion.source import check_semtoken
from ..evaluation.side_by_side import wait_for_device
from .texts import FIELDS


@dataclass
class Reading:
    """How a prompt was read and went on.

    Attributes:
        text: what was written behind the prompt.
        tokens, slots: of the prompt.
        budget: slots that the ratio allows; None where nothing was planned.
        kv_bytes: keys and values behind the prompt.
        new_tokens: that were written.
        prefill_seconds: planning and encoder included.
        decode_seconds: of all tokens after the first.
    """

    text: str = ""
    tokens: int = 0
    slots: int = 0
    budget: int | None = None
    kv_bytes: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def ratio(self) -> float:
        return self.tokens / self.slots

    @property
    def budget_met(self) -> bool | None:
        """None where nothing was planned."""
        return None if self.budget is None else self.slots <= self.budget

    @property
    def seconds_per_token(self) -> float | None:
        return self.decode_seconds / (self.new_tokens - 1) if self.new_tokens > 1 else None


def load(
    checkpoint: str, fields: dict[str, Any], trust_remote_code: bool, device: str | None, **options: Any
) -> tuple[Any, Any]:
    """Model and tokenizer of a SemToken checkpoint.

    Args:
        fields: compression fields instead of the checkpoint's.
        device: None: cuda where there is one; "auto": spread over what there is.
        options: `dtype`, `attn_implementation` of `from_pretrained`; None is left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint is a plain one, or has no such field; or there is no such device.
    """
    if not Path(checkpoint).exists() and (checkpoint[:1] in "/.~" or checkpoint.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {checkpoint}")
    if device not in (None, "auto"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device {device} cannot be used here: {error}") from None
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    check_semtoken(config, checkpoint)
    if unknown := sorted(fields.keys() - set(FIELDS)):
        raise ValueError(f"--set: {unknown} are no compression fields; known are {sorted(FIELDS)}")
    options = {name: value for name, value in options.items() if value is not None}
    if device == "auto":
        options["device_map"] = "auto"
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=trust_remote_code, **{"dtype": "auto", **options}, **fields
    ).eval()
    if device != "auto":
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, load_tokenizer(checkpoint, trust_remote_code)


def load_tokenizer(checkpoint: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        OSError: there is none.
        ValueError: its files are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except OSError:
        raise
    except Exception as error:  # of whatever kind a damaged file leads to
        raise ValueError(f"the tokenizer of {checkpoint} cannot be read: {type(error).__name__}: {error}") from error


def encode(tokenizer: Any, prompt: str, question: str | None, chat: bool) -> dict[str, Tensor]:
    """Inputs of one row, int64 [1, T]; the tokens of the question are marked by `query_mask`.

    Raises:
        ValueError: the question is empty, or a chat is asked for and the tokenizer has no template.
    """
    if question is not None and not question.strip():
        raise ValueError("the question is empty: leave --question out")
    text = prompt if question is None else f"{prompt.rstrip()}\n\n{question}"
    if chat:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            protect_template=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        inputs = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")
    if question is not None:
        start = text.rindex(question.strip())
        first, last = offsets[..., 0], offsets[..., 1]
        inputs["query_mask"] = ((last > start) & (first < start + len(question.strip()))).long()
    return dict(inputs)


def read_on(
    model: Any, inputs: dict[str, Tensor], when_read: Callable[[], None] = lambda: None, **options: Any
) -> tuple[Reading, Tensor]:
    """Generate behind one prompt, and note how it went.

    Args:
        inputs: int64 [1, T] each.
        when_read: called once the prompt is read.
        options: of `generate`.

    Returns:
        the reading, but for its text; the new ids, int64 [N].
    """
    tokens = inputs["input_ids"].shape[1]
    found = Reading(tokens=tokens, slots=tokens)
    start, compress = time.perf_counter(), model.compress

    def noting_plan(*args: Any, **kwargs: Any) -> Any:
        prompt = compress(*args, **kwargs)
        if not found.kv_bytes:
            found.slots, found.budget = prompt.slot_counts[0], int(prompt.budgets[0])
        return prompt

    def noting_prefill(_: Any, __: Any, outputs: Any) -> None:
        if found.kv_bytes:
            return
        wait_for_device()
        found.prefill_seconds = time.perf_counter() - start
        found.kv_bytes = cache_bytes(outputs.past_key_values)
        when_read()

    model.compress = noting_plan
    handle = model.register_forward_hook(noting_prefill)
    try:
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        ids = model.generate(**inputs, **options)[0, tokens:]
        wait_for_device()
    finally:
        handle.remove()
        del model.compress
    found.decode_seconds = time.perf_counter() - start - found.prefill_seconds
    found.new_tokens = len(ids)
    return found, ids
