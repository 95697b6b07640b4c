"""What a correct answer of `compress`, `forward` and `generate` is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments, Call, calls, make_arguments
from .judging import Family, require
from .oracle import Asked, check_close, check_positions, check_prompt, check_same
from .twins import configured

IGNORED = -100
TOLERANCES = {"float32": 5e-4, "bfloat16": 0.2, "float16": 0.05}
PLANNING = ("attention_mask", "span_ids", "protected_mask", "query_mask", "target_ratio")


def asked_of(call: Call, arguments: Arguments, read: Tensor | None = None) -> Asked:
    def mask(name: str) -> Tensor | None:
        value = arguments.given.get(name)
        return None if value is None else value != 0

    return Asked(
        copy.copy(call.model().config),
        arguments.ids.long(),
        arguments.valid,
        read,
        mask("protected_mask"),
        mask("query_mask"),
        arguments.given.get("target_ratio"),
        "span_ids" in arguments.given,
    )


def run_compress(call: Call) -> str:
    arguments = make_arguments(call)
    with configured(call.model(), call.fields) as model, torch.no_grad():
        prompt = model.compress(arguments.ids, **arguments.given)
        given = arguments.given.get("read_mask")
        read = None if given is None else (given != 0) & arguments.valid
        check_prompt(asked_of(call, arguments, read), prompt, model.get_input_embeddings())
        if "position_ids" not in arguments.given:
            check_positions(prompt, arguments.given.get("position_mode") or model.config.position_mode)
    return "merged" if prompt.is_merged else "nothing to merge"


def read_of(call: Call, arguments: Arguments) -> Tensor | None:
    """bool [B, T]: positions that a forward reads; None for all."""
    keep, labels = arguments.given.get("logits_to_keep", 0), arguments.given.get("labels")
    read = torch.zeros_like(arguments.valid)
    if isinstance(keep, Tensor):
        if keep.dtype == torch.bool:
            return keep
        for row in range(call.rows):
            read[row, keep if keep.ndim == 1 else keep[row]] = True
        return read
    if keep > 0:
        read[:, -keep:] = True
        return read
    if labels is None:
        return None
    read[:, :-1] = labels[:, 1:] != IGNORED
    return read


def run_forward(call: Call) -> str:
    arguments = make_arguments(call)
    with configured(call.model(), call.fields) as model, torch.no_grad():
        outputs = model(arguments.ids, **arguments.given)
        if outputs.get("span_ids") is None:
            theirs = call.plain()(arguments.ids, **arguments.plain())
            tolerance = TOLERANCES[call.dtype]
            same = (
                check_same if call.attention != "semtoken_varlen" else lambda a, b, w: check_close(a, b, w, tolerance)
            )
            same(outputs.logits, theirs.logits, "plain logits")
            require((outputs.loss is None) == (theirs.loss is None), "a loss from nowhere")
            if theirs.loss is not None:
                same(outputs.loss, theirs.loss, "plain loss")
            return "plain"
        check_slots(call, arguments, model, outputs)
    return "merged"


def check_slots(call: Call, arguments: Arguments, model: Any, outputs: Any) -> None:
    """The logits are those of the plain model over the slots of a correct plan."""
    given = arguments.given
    read = read_of(call, arguments)
    require(read is not None, "merged although all logits were asked for")
    planning = {name: given[name] for name in (*PLANNING, "position_ids") if name in given}
    prompt = model.compress(arguments.ids, read_mask=read, **planning)
    check_prompt(asked_of(call, arguments, read & arguments.valid), prompt, model.get_input_embeddings())
    require(torch.equal(prompt.span_ids, outputs.span_ids), "forward and compress plan differently")
    slots = call.plain()(
        inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, position_ids=prompt.position_ids
    )
    column = (prompt.inputs_embeds.shape[1] - prompt.kept_lengths)[:, None] + prompt.span_ids
    logits = slots.logits.gather(1, column.clamp(min=0)[..., None].expand(-1, -1, slots.logits.shape[-1]))
    logits = logits.masked_fill(~arguments.valid[..., None], 0)
    keep, labels, tolerance = given.get("logits_to_keep", 0), given.get("labels"), TOLERANCES[call.dtype]
    if isinstance(keep, Tensor) and keep.ndim == 2 and keep.dtype != torch.bool:
        expected = logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))
    elif isinstance(keep, Tensor):
        expected = logits[keep] if keep.dtype == torch.bool else logits[:, keep]
    elif keep:
        expected = logits[:, -keep:]
    else:
        scored = read & arguments.valid
        expected = logits.masked_fill(~scored[..., None], torch.nan)
    check_close(outputs.logits, expected, "logits over slots", tolerance)
    if labels is not None and not (isinstance(keep, Tensor) or keep):
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).masked_fill(~scored, IGNORED)
        loss = torch.nn.functional.cross_entropy(
            expected.nan_to_num().flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
        )
        check_close(outputs.loss.float(), loss, "loss", tolerance)


def plain_forward(call: Call) -> None:
    arguments = make_arguments(call)
    call.plain()(arguments.ids, **arguments.plain())


def run_generate(call: Call) -> str:
    arguments = make_arguments(call)
    given = {"max_new_tokens": 2, **arguments.given, "do_sample": False, "return_dict_in_generate": True}
    with configured(call.model(), call.fields) as model, torch.no_grad():
        out = model.generate(arguments.ids, **given)
        sequences, width = out.sequences, call.width
        require(torch.equal(sequences[:, :width], arguments.ids.long()), "the prompt was changed")
        new = sequences[:, width:]
        require(bool(((new >= 0) & (new < model.config.vocab_size)).all()), "an id out of the vocabulary")
        require(sequences.shape[1] <= width + given["max_new_tokens"], "more tokens than asked for")
        cache = out.get("past_key_values")
        if given.get("compression") is False or not hasattr(cache, "slot_lengths") or not cache.is_compressed:
            names = {"compression", "target_ratio", "span_ids", "protected_mask", "query_mask"}
            theirs = call.plain().generate(arguments.ids, **{n: v for n, v in given.items() if n not in names})
            if call.attention != "semtoken_varlen":
                check_same(sequences, theirs.sequences, "plain generation")
            return "plain"
        valid = arguments.valid.repeat_interleave(len(cache.slot_lengths) // call.rows, 0)
        check_cache(cache, valid, sequences.shape[1] - 1 - width, "recompress_every" in call.fields)
    return "merged"


def check_cache(cache: Any, valid: Tensor, new: int, hides_filler: bool) -> None:
    """The record of a cache behind a prompt and `new` tokens, where what fills up finished rows may be left out."""
    require(cache.get_seq_length() == valid.shape[1] + new, "get_seq_length is not the original length")
    tokens = valid.sum(1) + new
    same = torch.equal(cache.original_lengths, tokens) or (
        hides_filler and bool((cache.original_lengths <= tokens).all())
    )
    require(same, f"original_lengths is {cache.original_lengths.tolist()}, the rows have {tokens.tolist()} tokens")
    require(bool((cache.compressed_lengths <= cache.original_lengths).all()), "more slots than tokens")
    require(bool((cache.slot_lengths >= 0).all()), "a negative slot")
    require(cache.memory_bytes() > 0, "no bytes")
    if cache.ragged_rows is None:
        held = {layer.keys.shape[2] for layer in cache.layers}
        require(held == {cache.slot_lengths.shape[1]}, "layers hold other columns than the record")


def plain_generate(call: Call) -> None:
    arguments = make_arguments(call)
    given = {"max_new_tokens": 2, **arguments.plain(), "do_sample": False}
    if "prefill_chunk_size" in arguments.given:
        given["prefill_chunk_size"] = arguments.given["prefill_chunk_size"]
    call.plain().generate(arguments.ids, **given)


COMPRESS = Family(calls("compress"), run_compress, weight=3)
FORWARD = Family(calls("forward"), run_forward, plain_forward, weight=3)
GENERATE = Family(calls("generate"), run_generate, plain_generate, weight=2)
