"""Plans of one prompt as one HTML page that needs nothing from outside: `CompressedPrompt.to_html`.

The page draws itself from packed arrays (`page_template.py`): several plans of a long text stay small. Text
reaches it as JSON without any `<` and is never read as markup, and the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..compression import PromptOrigin
from .details import REASONS, SpanDetails, describe
from .page_template import PAGE, SCRIPT, STYLE

# What would end the script that holds the data, or a line of it; and halves of surrogate pairs, which no file takes.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
# Tokens for which a replacement character at the end of the text may still become another one.
LONGEST_DOUBT = 64
# Entropies and cosines are written in steps of this.
STEPS = 32767


def prompt_page(
    plans: Sequence[SpanDetails],
    tokenizer: Any,
    row: int | None = None,
    title: str = "What SemToken merges",
    shown: int = 0,
) -> str:
    """One self-contained page of one prompt, with a slider where there are several plans.

    Args:
        plans: of the same ids, one for each position of the slider.
        tokenizer: of these ids.
        row: of the batch; may be left out where there is one.
        title: of the page.
        shown: the plan that is shown first.

    Raises:
        ValueError: there is no such row, it has to be named, or the plans are of different ids.
    """
    rows = len(plans[0].input_ids)
    if row is None and rows != 1:
        raise ValueError(f"pass `row`, 0 to {rows - 1}: a page shows one prompt, and this batch has {rows}")
    row = row or 0
    if not 0 <= row < rows:
        raise ValueError(f"`row` must be in 0 to {rows - 1}, got {row}")
    ids = row_of(plans[0], "input_ids", row).tolist()
    if any(row_of(plan, "input_ids", row).tolist() != ids for plan in plans[1:]):
        raise ValueError("all plans of a page must be of the same ids")
    # Several plans have much in common: every array is written once.
    pool: dict[str, int] = {}
    packed = [_pack_plan(plan, row, pool) for plan in plans]
    data = {"pieces": token_pieces(tokenizer, ids), "plans": packed, "pool": list(pool), "shown": shown}
    data |= {"reasons": REASONS, "steps": STEPS}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    filled = {"TITLE": html.escape(title), "DIGEST": digest, "SCRIPT": SCRIPT, "STYLE": STYLE}
    filled["DATA"] = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return re.sub(r"@([A-Z]+)@", lambda name: filled[name[1]], PAGE)


def page_of_origin(origin: PromptOrigin, tokenizer: Any, row: int | None = None) -> str:
    """`CompressedPrompt.to_html` of a prompt of this origin."""
    return prompt_page([describe(origin)], tokenizer, row)


def row_of(plan: SpanDetails, name: str, row: int) -> Tensor:
    """The field `name` [B, T] of the tokens of one row, without padding, on the CPU: [n]."""
    return getattr(plan, name)[row][plan.span_ids[row] >= 0].cpu()


def token_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the text before it; together they are the whole text.

    A token that holds a part of a character adds nothing; the one that completes it adds the character.
    """
    pieces: list[str] = []
    # Text is decoded from `first` on, where a character begins; `told` characters of it were added already.
    first, whole, told = 0, 0, 0
    for stop in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[first:stop])
        is_whole = not text.endswith("\ufffd") or stop == len(ids) or stop - whole > LONGEST_DOUBT
        certain = len(text) if is_whole else len(text.rstrip("\ufffd"))
        pieces.append(text[told:certain])
        told = max(told, certain)
        if is_whole:
            first, whole = whole, stop
            told = len(_decode(tokenizer, ids[first:whole]))
    return pieces


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pack_plan(plan: SpanDetails, row: int, pool: dict[str, int]) -> dict[str, Any]:
    """A row of a plan for the script; arrays are base64 in `pool`, and their places in it are returned."""

    def tokens(name: str) -> np.ndarray:
        return row_of(plan, name, row).numpy()

    def pack(array: np.ndarray) -> int:
        return pool.setdefault(base64.b64encode(array.tobytes()).decode(), len(pool))

    def opens(ids: np.ndarray) -> int:
        return pack(np.packbits(np.diff(ids, prepend=-1) != 0))

    def fractions(values: np.ndarray) -> int | None:
        if not len(values) or np.isnan(values).any():
            return None
        return pack(np.rint(values * STEPS).astype("<i2"))

    position, carrier = tokens("position"), tokens("is_carrier")
    return {
        "ratio": plan.target_ratio,
        "budget": int(plan.budget[row]),
        "mode": plan.merge_mode,
        "slots": opens(tokens("span_ids")),
        "candidates": opens(tokens("candidate_ids")),
        "carriers": pack(np.packbits(carrier)),
        "positions": pack(position[carrier].astype("<i4")),
        "reason": pack(tokens("reason")),
        "entropy": fractions(tokens("entropy")),
        "similarity": fractions(tokens("similarity")),
    }


__all__ = ["page_of_origin", "prompt_page", "token_pieces"]
