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

from ..benchmarking.clock import seconds_of
from ..benchmarking.models import plain_twin
from ..benchmarking.shapes import shape_of
from ..benchmarking.variants import PADDED, PLAIN_N, TITLES, Variant
from .equivalence import Backend
from .machine import has_flash_attention
from .measuring import NEW_TOKENS, RATIO, measure_variant
from .models import build_model, prompts
from .parts import Context, TimeUp, attention, free_memory

ROWS, PAGE = 4, 256
TIMES = ("prefill ms", "generate+64 ms")
MATH = Backend("sdpa math", "sdpa", SDPBackend.MATH)


def fast_attention(device: torch.device) -> Backend:
    """flash-attn where it is installed, else SDPA's own flash kernel."""
    if has_flash_attention() and device.type == "cuda":
        return Backend("flash_attention_2", "flash_attention_2")
    return Backend("sdpa flash", "sdpa", SDPBackend.FLASH_ATTENTION)


def largest_shape(context: Context, share: float = 0.5) -> str:
    """The largest of the context's shapes whose weights take at most this share of the free memory."""
    free = context.free_bytes()
    fitting = [shape for shape in context.shapes if shape_of(shape).weight_bytes(context.dtype) < share * free]
    return fitting[-1] if fitting else context.shapes[0]


def record_product(context: Context, what: str, times: dict[tuple[str, str], float], base: tuple[str, str]) -> None:
    """Whether two gains multiply.

    Args:
        what: is measured.
        times: milliseconds by (backend, variant), two of each.
        base: the slow one of both.
    """
    backend, variant = (next(key[i] for key in times if key[i] != base[i]) for i in range(2))
    gains = [times[base] / times[key] for key in ((backend, base[1]), (base[0], variant), (backend, variant))]
    context.row(
        product=what,
        **{f"{backend} alone": gains[0], f"{variant} alone": gains[1], "both": gains[2]},
        **{"product of the two": gains[0] * gains[1], "both / product": gains[2] / (gains[0] * gains[1])},
    )


def plain_and_ours(model: Any, plain: Any, lengths: list[int], backend: Backend) -> list[Variant]:
    """Both ways to read rows of so many tokens, with one attention."""
    batch, implementation = prompts(lengths, model.device), backend.implementation
    ours = Variant(PADDED, model, batch, implementation, {"target_ratio": RATIO})
    return [Variant(PLAIN_N, plain, batch, implementation), ours]


def multiply_flash_attention(context: Context, model: Any, plain: Any, lengths: tuple[int, ...]) -> None:
    """{SDPA's math kernel, FlashAttention} x {plain, SemToken}, by prompt length."""
    encoder = model.base_model.semantic_encoder
    for length in lengths:
        measured = {}
        for backend in (fast_attention(context.device), MATH):  # what takes less memory first
            for variant in plain_and_ours(model, plain, [length], backend):

                def measure(variant: Variant = variant, backend: Backend = backend) -> Any:
                    with attention(variant.model, backend.implementation, backend.kernel):
                        return measure_variant(variant, encoder, context.deadline)

                title = TITLES[variant.name]
                record = context.attempt(f"{backend.name}, {title}, {length:,} tokens", measure)
                if record is None:
                    return
                context.row(attention=backend.name, **record)
                measured[backend.name, title] = record
        for name in TIMES:
            times = {key: record[name] for key, record in measured.items()}
            record_product(context, f"{name}, {length:,} tokens", times, (MATH.name, TITLES[PLAIN_N]))


def batching_options(context: Context, length: int) -> ContinuousBatchingConfig:
    """Blocks for `ROWS` whole prompts, and nothing fetched from the Hub; names differ between versions."""
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in known else "block_size"
    options: dict[str, Any] = {page: PAGE, "num_blocks": ROWS * (-(-(length + NEW_TOKENS) // PAGE) + 2)}
    options |= {"max_batch_tokens": min(length, 8192), "auto_switch_to_flash": False, "use_cuda_graph": False}
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})


def multiply_paged_attention(context: Context, model: Any, plain: Any, length: int) -> None:
    """{`generate` over a batch, `generate_batch`} x {plain, SemToken}: the same prompts of equal length."""
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Each call makes a manager of its own, whose preparation is not what is compared.
    more = {"warmup": False} if "warmup" in inspect.signature(ContinuousMixin.generate_batch).parameters else {}

    def padded(variant: Variant) -> None:
        variant.generate(NEW_TOKENS)

    def paged(variant: Variant) -> None:
        outputs = variant.model.generate_batch(
            variant.batch.input_ids.tolist(),
            generation_config=settings,
            continuous_batching_config=batching_options(context, length),
            **variant.call,
            **more,
        )
        if errors := [output.error for output in outputs.values() if output.error]:
            raise RuntimeError(f"generate_batch: {errors[0]}")

    times, fast = {}, fast_attention(context.device)
    for kind, call in (("generate", padded), ("generate_batch", paged)):
        for variant in plain_and_ours(model, plain, [length] * ROWS, fast):

            def measure(call: Any = call, variant: Variant = variant) -> float:
                with attention(variant.model, fast.implementation):
                    # The manager's own thread is no place to be stopped in.
                    if seconds_of(partial(call, variant)) > context.left():
                        raise TimeUp
                    return 1e3 * seconds_of(partial(call, variant))

            title = TITLES[variant.name]
            taken = context.attempt(f"{kind}, {title}", measure)
            if taken is None:
                return
            times[kind, title] = taken
            context.row(batching=kind, variant=title, rows=ROWS, tokens=length, **{"generate+64 ms": taken})
    what = f"{ROWS} x {length:,} tokens, generate+64 ms"
    record_product(context, what, times, ("generate", TITLES[PLAIN_N]))


def multiply_gains(context: Context) -> None:
    """Four times each, and whether the product holds."""
    shape = largest_shape(context)
    context.note(f"Shape {shape}, random weights, the embedded checkpoint's static encoder, {RATIO} tokens a slot.")
    lengths = [length for length in context.lengths if length <= 16384]
    model = build_model(shape_of(shape), context.device, context.dtype)
    plain = plain_twin(model)
    try:
        multiply_flash_attention(context, model, plain, tuple(lengths[-3:]))
        # Its cache stands beside that of the prompts.
        length = min(lengths[-1], 4096)
        if 2 * shape_of(shape).slot_bytes(context.dtype) * ROWS * length > context.free_bytes():
            return context.note("Too little memory for PagedAttention.")
        multiply_paged_attention(context, model, plain, length)
    finally:
        del model, plain
        free_memory()
