"""A second opinion on decoding: the plain model reads slots and tokens in one go, without a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semtoken_hf import SemTokenCache

from .cases import Case, model_of, plain_of


@dataclass(frozen=True)
class Part:
    """Tokens int64 [n] of one row, merged at a ratio, or one slot each (None); `read`: bool [n], positions read."""

    ids: Tensor
    ratio: float | None = None
    read: Tensor | None = None


def positions_by_hand(case: Case, counts: Tensor, planned: Tensor | None, tokens: int, slots: int) -> Tensor:
    """Positions [1, M] of new slots of `counts` tokens, behind so many tokens and slots."""
    if case.positions == "compact":
        return slots + torch.arange(counts.shape[1])[None]
    last = tokens + counts.cumsum(1) - 1
    if planned is None or case.merge != "representative":
        return last
    # The representative is any token of the span.
    assert ((planned <= last) & (planned > last - counts)).all()
    return planned


@torch.no_grad()
def read_parts(case: Case, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Logits [M, V] over all slots of one row, and their lengths int64 [M]."""
    model, plain = model_of(case), plain_of(case)
    # Only its record is used: `compress` asks it what came before.
    record = SemTokenCache()
    slots, positions = [], []
    for part in parts:
        ids, held = part.ids[None], record.slot_lengths
        planned, counts, embeddings = None, torch.ones_like(ids), plain.get_input_embeddings()(ids)
        if part.ratio is not None:
            read = None if part.read is None else part.read[None]
            behind = None if held is None else record
            prompt = model.compress(ids, target_ratio=part.ratio, read_mask=read, past_key_values=behind)
            planned, counts, embeddings = prompt.position_ids, prompt.slot_lengths, prompt.inputs_embeds
        tokens, columns = (0, 0) if held is None else (int(held.sum()), held.shape[1])
        positions.append(positions_by_hand(case, counts, planned, tokens, columns))
        slots.append(embeddings)
        record.record(counts, ids.shape[1], compressed=True, padded=False)
    embeddings, where = torch.cat(slots, 1), torch.cat(positions, 1)
    seen = torch.ones_like(where)
    logits = plain(inputs_embeds=embeddings, position_ids=where, attention_mask=seen, use_cache=False).logits[0]
    return logits, record.slot_lengths[0]
