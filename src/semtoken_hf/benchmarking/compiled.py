"""`torch.compile` of the compression stage and of a step of decoding, beside eager."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo
from tqdm.auto import tqdm

from ..evaluation.files import write_text
from .cells import Bench, read_result
from .clock import rounds_left, seconds_of
from .configuration import BenchmarkConfig
from .models import plain_twin
from .stage_clock import PARTS, replace_everywhere
from .workloads import make_batch

# Calls that make compiled code settle on its shapes.
WARM_UP = 3


def compiled_path(config: BenchmarkConfig, shape: str, length: int, ratio: float) -> Path:
    return config.folder / "compiled" / f"{shape}__{config.encoder_name}__{length}@{ratio:g}.json"


def run_compiled(config: BenchmarkConfig, shape: str) -> None:
    """Measure eager beside compiled at the lengths that are missing."""
    wanted = [(ratio, length) for ratio in config.ratios for length in sorted(config.lengths)]
    missing = [w for w in wanted if read_result(compiled_path(config, shape, w[1], w[0]), config) is None]
    if not missing:
        return
    bench = Bench(config, shape, max(config.lengths) + 1000)
    plain = plain_twin(bench.model)
    for ratio, length in tqdm(missing, desc=f"compiled, {shape}", unit="cell"):
        records = measure_compiled(bench, plain, length, ratio)
        result = {**bench.origin, "length": length, "ratio": ratio, "records": records}
        write_text(compiled_path(config, shape, length, ratio), json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def measure_compiled(bench: Bench, plain: Any, length: int, ratio: float) -> list[dict[str, Any]]:
    """One record each for the stage and for a step of decoding of plain Llama and of SemToken.

    Returns:
        what; eager and compiled, seconds in turn; compile_seconds of the first compiled call; graph_breaks while
        warming up; error, why it does not compile.
    """
    model, config = bench.model, bench.config
    batch = make_batch("1", bench.ids, length, model.device)
    stage = partial(model.compress, batch.input_ids, target_ratio=ratio)

    def compiled_stage() -> Any:
        with compiled_parts(compiled):
            return stage()

    compiled: dict[Any, Any] = {}
    records = [{"what": "stage", **compare(stage, compiled_stage, config)}]
    for what, decoder in (("decode, plain", plain), ("decode, SemToken", model)):
        eager = decoding_step(decoder, decoder, batch, ratio)
        step = decoding_step(torch.compile(decoder, dynamic=True), decoder, batch, ratio)
        records.append({"what": what, **compare(eager, step, config)})
    return records


@contextlib.contextmanager
def compiled_parts(known: dict[Any, Any]) -> Iterator[None]:
    """The parts of the stage, compiled one by one, `known` from one call to the next; what calls them stays eager."""

    def compiled(function: Any) -> Any:
        if function not in known:
            known[function] = torch.compile(function, dynamic=True)
        return known[function]

    replaced = replace_everywhere({name: compiled for name in PARTS if name != "compress_prompt"})
    try:
        yield
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def decoding_step(run: Any, model: Any, batch: Any, ratio: float) -> Callable[[], Any]:
    """A call that appends one token, with `run`, to the cache of a prompt that `model` has read."""
    call = {"target_ratio": ratio} if hasattr(model, "compress") else {}
    cache = model(batch.input_ids, logits_to_keep=1, use_cache=True, **call).past_key_values
    token = batch.input_ids[:, -1:]
    return lambda: run(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def compare(eager: Callable[[], Any], compiled: Callable[[], Any], config: BenchmarkConfig) -> dict[str, Any]:
    """Both in turn, after warming up; only eager where the other one fails."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    found: dict[str, Any] = {"eager": [], "compiled": []}
    calls = {"eager": eager, "compiled": compiled}
    try:
        found["compile_seconds"] = seconds_of(compiled)
        for _ in range(WARM_UP):
            compiled()
        found["graph_breaks"] = sum(dynamo.utils.counters["graph_break"].values())
        found["graphs"] = dynamo.utils.counters["stats"]["unique_graphs"]
    except Exception as error:  # whatever the compiler raises is a finding
        found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        del calls["compiled"]

    def play() -> None:
        for name, call in calls.items():
            found[name].append(seconds_of(call))

    play()
    for name in calls:
        found[name].clear()
    for _ in range(max(1, rounds_left(seconds_of(play), config.max_seconds, 3 * config.repetitions))):
        play()
    return found


__all__ = ["measure_compiled", "run_compiled"]
