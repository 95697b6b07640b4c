"""Context-compressed perplexity: the next tokens of a text behind a compressed context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..prompts import Prompt
from ..texts import make_windows, window_prompt
from .base import Task, TaskSettings
from .sources import read_text, spread


@dataclass
class Perplexity(Task):
    """Consecutive windows of a text: `context_length` tokens opened by BOS, then `target_length` scored ones."""

    def prompts(self, tokenizer: Any, settings: TaskSettings) -> list[Prompt]:
        self.require(settings)
        text = read_text(str(settings.source), self.hub_name)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        context, target = settings.context_length, settings.target_length
        windows = make_windows(ids, context, target, tokenizer.bos_token_id, len(ids))
        chosen = spread(list(range(len(windows))), settings.fraction)
        return [window_prompt(i, windows[i], context) for i in chosen]
