"""Part: do FlashAttention's and PagedAttention's gains multiply with SemToken's?"""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousMixin

from ..evaluation.side_by_side import timed
from .equivalence import Backend
from .machine import has_flash_attention
from .measuring import NEW_TOKENS, measure_way, ways_at
from .models import build_model, kv_bytes, text_ids, weight_bytes
from .parts import Context, TimeUp, attention, free_memory, time_limit

RATIO, ROWS, PAGE = 2.4, 4, 256
TIMES = ("prefill ms", "generate+64 ms")
MATH = Backend("sdpa math", "sdpa", SDPBackend.MATH)


def fast_attention(device: torch.device) -> Backend:
    """flash-attn where it is installed, else SDPA's own flash kernel."""
    if has_flash_attention() and device.type == "cuda":
        return Backend("flash_attention_2", "flash_attention_2")
    return Backend("sdpa flash", "sdpa", SDPBackend.FLASH_ATTENTION)


def largest_shape(context: Context, share: float = 0.5) -> str:
    """The largest of the context's shapes whose weights take at most this share of the free memory."""
    if context.device.type != "cuda":
        return context.shapes[-1]
    free, _ = torch.cuda.mem_get_info(context.device)
    fitting = [shape for shape in context.shapes if weight_bytes(shape) < share * free]
    return fitting[-1] if fitting else context.shapes[0]


def record_product(context: Context, what: str, times: dict[tuple[str, str], float], base: tuple[str, str]) -> None:
    """Whether two gains multiply.

    Args:
        what: is measured.
        times: milliseconds by (backend, way), two of each.
        base: the slow one of both.
    """
    backend, way = (next(key[i] for key in times if key[i] != base[i]) for i in range(2))
    gains = [times[base] / times[key] for key in ((backend, base[1]), (base[0], way), (backend, way))]
    context.row(
        product=what,
        **{f"{backend} alone": gains[0], f"{way} alone": gains[1], "both": gains[2]},
        **{"product of the two": gains[0] * gains[1], "both / product": gains[2] / (gains[0] * gains[1])},
    )


def multiply_flash_attention(context: Context, model: Any, lengths: tuple[int, ...]) -> None:
    """{SDPA's math kernel, FlashAttention} x {plain, SemToken}, by prompt length."""
    plain, _, ours = ways_at(RATIO)
    backends = (MATH, fast_attention(context.device))
    for length in lengths:
        ids, measured = text_ids(length, context.device), {}
        for backend in reversed(backends):  # what takes less memory first
            for way in (plain, ours):

                def measure(backend: Backend = backend, way: Any = way, ids: Any = ids) -> Any:
                    with attention(model, backend.implementation, backend.kernel), time_limit(model, context.deadline):
                        return measure_way(model, ids, way)

                record = context.attempt(f"{backend.name}, {way.name}, {length:,} tokens", measure)
                if record is None:
                    return
                context.row(attention=backend.name, **record)
                measured[backend.name, way.name] = record
        for name in TIMES:
            times = {key: record[name] for key, record in measured.items()}
            record_product(context, f"{name}, {length:,} tokens", times, (MATH.name, plain.name))


def batching_options(context: Context, length: int) -> ContinuousBatchingConfig:
    """Blocks for `ROWS` whole prompts, and nothing fetched from the Hub; names differ between versions."""
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in known else "block_size"
    options: dict[str, Any] = {page: PAGE, "num_blocks": ROWS * (-(-(length + NEW_TOKENS) // PAGE) + 2)}
    options |= {"max_batch_tokens": min(length, 8192), "auto_switch_to_flash": False, "use_cuda_graph": False}
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})


def multiply_paged_attention(context: Context, model: Any, length: int) -> None:
    """{`generate` over a batch, `generate_batch`} x {plain, SemToken}: the same prompts of equal length."""
    plain, _, ours = ways_at(RATIO)
    rows = torch.cat([text_ids(length, context.device, start=97 * row) for row in range(ROWS)])
    lengths = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    settings = GenerationConfig(**lengths, eos_token_id=-1, pad_token_id=0)
    # Each call makes a manager of its own, whose preparation is not what is compared.
    more = {"warmup": False} if "warmup" in inspect.signature(ContinuousMixin.generate_batch).parameters else {}

    def padded(arguments: dict[str, Any]) -> Any:
        return model.generate(rows, attention_mask=torch.ones_like(rows), **lengths, **arguments)

    def paged(arguments: dict[str, Any]) -> Any:
        batching = batching_options(context, length)
        outputs = model.generate_batch(
            rows.tolist(), generation_config=settings, continuous_batching_config=batching, **arguments, **more
        )
        if errors := [output.error for output in outputs.values() if output.error]:
            raise RuntimeError(f"generate_batch: {errors[0]}")
        return outputs

    times = {}
    for kind, call in (("generate", padded), ("generate_batch", paged)):
        for way in (plain, ours):

            def measure(call: Any = call, way: Any = way) -> float:
                # The manager's own thread is no place to be stopped in.
                first, _ = timed(partial(call, way.arguments))
                if first > context.left():
                    raise TimeUp
                return 1e3 * timed(partial(call, way.arguments))[0]

            taken = context.attempt(f"{kind}, {way.name}", measure)
            if taken is None:
                return
            times[kind, way.name] = taken
            context.row(batching=kind, way=way.name, rows=ROWS, tokens=length, **{"generate+64 ms": taken})
    record_product(context, f"{ROWS} x {length:,} tokens, generate+64 ms", times, ("generate", plain.name))


def multiply_gains(context: Context) -> None:
    """Four times each, and whether the product holds."""
    shape = largest_shape(context)
    context.note(f"Shape {shape}, random weights, static encoder with a random table, {RATIO} tokens a slot.")
    lengths = [length for length in context.lengths if length <= 16384]
    model = build_model(shape, context.device, context.dtype)
    try:
        multiply_flash_attention(context, model, tuple(lengths[-3:]))
        # Its cache stands beside that of the prompts.
        length = min(lengths[-1], 4096)
        if context.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(context.device)
            if 2 * kv_bytes(shape, ROWS * length) > free:
                return context.note("Too little memory for PagedAttention.")
        fast = fast_attention(context.device)
        with attention(model, fast.implementation):
            multiply_paged_attention(context, model, length)
    finally:
        del model
        free_memory()
