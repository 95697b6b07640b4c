"""Part: every attention backend against eager in float32, and plans that depend on neither device nor dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..benchmarking.shapes import ModelShape
from ..varlen_semtoken import VARLEN
from .machine import has_flash_attention
from .models import build_model, prompts
from .parts import Context, attention, free_memory

RATIO, STEPS = 2.4, 4
# Heads of a width that kernels are made for, two of them on each key.
SHAPE = ModelShape(256, 512, 2, 4, 2, vocab_size=8192, dtype="float32")
# The last row is shorter than `min_prompt_length` and stays plain.
LENGTHS = (384, 290, 150, 40)
FIELDS: dict[str, Any] = {"min_prompt_length": 64, "recent_window": 16, "initializer_range": 0.08}
# As FlashAttention's own tests: at most twice the error of eager in the same dtype, and a little.
FACTOR, SLACK = 2.0, 1e-3
# The default follows no fingerprint where nothing is asked.
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper's": {"segmentation_mode": "greedy", "max_span_length": 8},
    "boundary": {"segmentation_mode": "boundary"},
}
# What kernels say that take no mask, no grouped heads or not this dtype.
NO_KERNEL = ("No available kernel", "No viable backend")
HALF_ONLY = ("fp16", "float16", "half")


@dataclass(frozen=True)
class Backend:
    """A name for reports, `attn_implementation`, and which of SDPA's kernels."""

    name: str
    implementation: str
    kernel: SDPBackend | None = None


@dataclass(frozen=True)
class Case:
    """Prompts, and how many slots the layers read at a time."""

    name: str
    lengths: tuple[int, ...]
    chunk: int | None = None

    def prompts(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        batch = prompts(self.lengths, device)
        return batch.input_ids, batch.attention_mask if len(self.lengths) > 1 else None


CASES = (Case("one row", LENGTHS[:1]), Case("ragged batch", LENGTHS), Case("in chunks", LENGTHS[:1], 50))


def available_backends(device: torch.device) -> list[Backend]:
    """What this machine has; eager is not among them."""
    kernels = ["MATH", "FLASH_ATTENTION"]
    if device.type == "cuda":
        kernels += ["EFFICIENT_ATTENTION", "CUDNN_ATTENTION"]
    found = [Backend(f"sdpa {name.split('_')[0].lower()}", "sdpa", getattr(SDPBackend, name)) for name in kernels]
    if has_flash_attention() and device.type == "cuda":
        found.append(Backend("flash_attention_2", "flash_attention_2"))
    return [*found, Backend(VARLEN, VARLEN)]


def read_and_decode(model: Any, case: Case, fed: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits of the prompts' last tokens and of a few steps behind them.

    Args:
        model: on the device to run on.
        case: what to read.
        fed: int64 [B, 1] tokens of each step; None: the most likely ones.

    Returns:
        float32 [B, STEPS + 1, V] on the CPU, and the tokens that were fed.
    """
    ids, mask = case.prompts(model.device)
    out = model(ids, attention_mask=mask, logits_to_keep=1, target_ratio=RATIO, prefill_chunk_size=case.chunk)
    assert out.past_key_values.is_compressed
    logits, tokens = [out.logits], []
    for step in range(STEPS):
        token = logits[-1][:, -1].argmax(-1, keepdim=True) if fed is None else fed[step].to(model.device)
        tokens.append(token)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        out = model(token, attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1).float().cpu(), tokens


def _describe(error: Exception, dtype: torch.dtype) -> tuple[str, bool | None]:
    """What a table says of an error, and whether a check failed (None: a kernel that does not take this case)."""
    text = " ".join(str(error).split())
    if any(sign in text for sign in (*NO_KERNEL, *(HALF_ONLY if dtype == torch.float32 else ()))):
        return "not supported by this kernel", None
    return f"{type(error).__name__}: {text[:200]}", False


def compare_backends(context: Context, dtype: torch.dtype, backends: list[Backend] | None = None) -> None:
    """One row for each case and backend, against eager in float32 with the same (rounded) weights."""
    model = build_model(SHAPE, context.device, dtype, attn_implementation="eager", **FIELDS)
    exact = copy.deepcopy(model).float()
    exact.config._attn_implementation = "eager"
    for case in CASES:
        reference, fed = read_and_decode(exact, case)
        eager_error = float((read_and_decode(model, case, fed)[0] - reference).abs().max())
        tolerance = FACTOR * eager_error + SLACK * float(reference.abs().max())
        for backend in available_backends(context.device) if backends is None else backends:
            label = f"{backend.name}, {case.name}, {str(dtype).removeprefix('torch.')}"
            error, holds, remark = None, None, ""
            try:
                with attention(model, backend.implementation, backend.kernel):
                    logits, _ = read_and_decode(model, case, fed)
                # Not a number is no error within the tolerance.
                error = float((logits - reference).abs().max())
                holds = error <= tolerance
            except Exception as failure:
                remark, holds = _describe(failure, dtype)
            context.row(
                case=case.name,
                backend=backend.name,
                dtype=str(dtype).removeprefix("torch."),
                **{"max abs error": error, "tolerance": tolerance, "eager's own": eager_error, "remark": remark},
            )
            if holds is not None:
                context.check(label, holds)
    del model, exact
    free_memory()


def compare_plans(context: Context, encoder: str) -> None:
    """Plans of the same prompts on the CPU in float32, and on the device in every dtype (law 7)."""
    batch = prompts(LENGTHS)
    ids, mask = batch.input_ids, batch.attention_mask
    for plan, fields in PLANS.items():
        on_cpu = build_model(SHAPE, "cpu", encoder=encoder, **{**FIELDS, **fields})
        wanted = on_cpu.compress(ids, mask, target_ratio=RATIO).span_ids
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = copy.deepcopy(on_cpu).to(context.device, dtype)
            spans = model.compress(ids.to(context.device), mask.to(context.device), target_ratio=RATIO).span_ids.cpu()
            place = f"{context.device.type}, {str(dtype).removeprefix('torch.')}"
            differing = int((spans != wanted).sum())
            context.row(encoder=encoder, plan=plan, where=place, **{"tokens in another slot": differing})
            context.check(f"plan ({plan}, {encoder} encoder) on {place} as on the CPU", differing == 0)


def check_equivalence(context: Context) -> None:
    context.note(
        f"Logits of a random model of {SHAPE.num_hidden_layers} layers with heads of 64, at {RATIO} tokens a slot in "
        f"original positions: prefill, {STEPS} steps. Tolerance: {FACTOR:g} times the error of eager in the same "
        f"dtype, plus {SLACK:g} of the largest logit."
    )
    for encoder in ("static", "transformer"):
        compare_plans(context, encoder)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare_backends(context, dtype)
