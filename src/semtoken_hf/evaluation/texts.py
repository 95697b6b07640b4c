"""Texts to measure on, cut into windows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.corpus import read_held_out
from .prompts import Prompt


def make_windows(ids: Tensor, context_length: int, target_length: int, bos_id: int, limit: int) -> Tensor:
    """Consecutive windows int64 [W, context_length + target_length] of a text, each opened by BOS; at most `limit`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    length = context_length + target_length
    windows = ids[: len(ids) // length * length].view(-1, length)[:limit].clone()
    if not len(windows):
        raise ValueError(f"the text has {len(ids)} tokens, one window needs {length}")
    windows[:, 0] = bos_id
    return windows


def window_prompt(number: int, window: Tensor, context_length: int) -> Prompt:
    """A window int64 [context + target] as a prompt without a question, and what is scored behind it."""
    nothing = torch.zeros(context_length, dtype=torch.bool, device=window.device)
    return Prompt(f"window-{number}", window[:context_length], 0, window[context_length:], nothing)


def add_text_arguments(parser: argparse.ArgumentParser, context: int, target: int) -> None:
    """The options that `load_windows` reads."""
    parser.add_argument("--text-file", type=Path, nargs="*", default=[], help="texts that nobody trained on")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="corpus files: their held-out documents")
    parser.add_argument("--held-out-share", type=float, default=0.01, help="as in training")
    parser.add_argument("--context", type=int, default=context, help="context tokens of a window")
    parser.add_argument("--target", type=int, default=target, help="scored tokens of a window")
    parser.add_argument("--windows", type=int, default=60, help="of each text, at most")


def load_windows(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Windows int64 [W, context + target] of every text, by its name.

    Raises:
        ValueError: no text is given, or one is shorter than a window.
    """
    texts = {f.name: f.read_text(encoding="utf-8") for f in arguments.text_file}
    texts |= {f"held out of {f.name}": read_held_out(f, arguments.held_out_share) for f in arguments.held_out}
    if not texts:
        raise ValueError("nothing to measure on: pass --text-file or --held-out")
    windows = {}
    for name, text in texts.items():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        windows[name] = make_windows(
            ids, arguments.context, arguments.target, tokenizer.bos_token_id, arguments.windows
        )
    return windows
