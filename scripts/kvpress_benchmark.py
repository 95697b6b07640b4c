#!/usr/bin/env python
"""Time the presses of kvpress on the prompts of a benchmark, in its own environment, without semtoken_hf.

    python scripts/benchmark.py --shapes 160m --output-dir benchmark              # leaves plan.json
    .venv-kvpress/bin/python scripts/kvpress_benchmark.py benchmark               # leaves kvpress.json
    python scripts/benchmark.py --output-dir benchmark --report                   # shows both

A plain Llama of the same shape with random weights reads the same ids, alone and with each press at the compression
ratio 1 - 1 / ratio; a run that was killed goes on where it was. `scripts/kvpress_baselines.sh` makes the environment.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "semtoken_hf"
PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "TOVAPress", "KnormPress", "StreamingLLMPress")


def load_helper(name: str) -> Any:
    """A module of `semtoken_hf` by its path: the package itself needs a newer Transformers."""
    spec = importlib.util.spec_from_file_location(f"semtoken_{Path(name).name}", PACKAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


clock, shapes, workloads = (load_helper(f"benchmarking/{name}") for name in ("clock", "shapes", "workloads"))
continuation = load_helper("evaluation/continuation")

Variants = dict[str, Callable[[], dict[str, Any]]]


def build_model(plan: dict[str, Any], shape: Any) -> Any:
    """Plain Llama with random weights, made on the device in its dtype."""
    positions = max(plan["lengths"]) + plan["new_tokens"]
    config = LlamaConfig(**shape.config_fields(plan["vocab_size"], positions))
    torch.manual_seed(0)
    with torch.device(plan["device"]):
        dtype = shapes.dtype_of(plan["dtype"] or shape.dtype)
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=plan["attn_implementation"])
    return model.eval()


@torch.no_grad()
def read(model: Any, ids: Tensor, press: Any, new_tokens: int) -> dict[str, Any]:
    """Seconds to the first token, of all `new_tokens` and of each further one; bytes of the cache after prefill."""
    cache: Any = DynamicCache(config=model.config)
    found: dict[str, Any] = {}
    stamps = [clock.timer()]

    def run() -> None:
        if press is None:
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        else:
            with press(model):
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        # `decode_greedily` reads the first token off these.
        logits.argmax().item()
        stamps.append(clock.timer())
        found["kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        prefill = continuation.Prefill(cache, logits[0, -1], ids.shape[1], ids.shape[1])
        continuation.decode_greedily(model, prefill, new_tokens, lambda ids: False)

    stamps[0] = clock.timer()
    whole = clock.seconds_of(run)
    first = stamps[1] - stamps[0]
    return {**found, "prefill": first, "decode": (whole - first) / (new_tokens - 1), "generate": whole}


def measure(plan: dict[str, Any], model: Any, length: int, ratio: float, presses: list[str]) -> dict[str, Any]:
    """Plain and every press in turn; `variants` by name, a sample a round."""
    import kvpress

    batch = workloads.make_batch("1", torch.tensor(plan["ids"]), length, plan["device"])
    variants: Variants = {"plain": partial(read, model, batch.input_ids, None, plan["new_tokens"])}
    for name in presses:
        press = getattr(kvpress, name)(compression_ratio=1 - 1 / ratio)
        variants[name] = partial(read, model, batch.input_ids, press, plan["new_tokens"])
    found: dict[str, Any] = {name: {"prefill": [], "decode": [], "generate": []} for name in variants}

    def play() -> None:
        for name, variant in variants.items():
            measured = variant()
            found[name]["kv_bytes"] = measured.pop("kv_bytes")
            for time, seconds in measured.items():
                found[name][time].append(seconds)

    rounds = clock.rounds_left(clock.seconds_of(play), plan["max_seconds"], plan["repetitions"])
    for _ in range(rounds):
        play()
    if rounds:  # the first one warmed up
        for variant in found.values():
            for time in ("prefill", "decode", "generate"):
                del variant[time][0]
    return {"variants": found}


def provenance() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    versions |= {package: version(package) for package in ("kvpress", "transformers", "torch")}
    command = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return {
        "command": f"python scripts/{Path(sys.argv[0]).name} {shlex.join(command)}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "machine": f"{torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def predicted(known: list[dict[str, Any]], result: dict[str, Any]) -> float:
    """Seconds of a round, from the longest shorter prompt: time grows with the square of the length."""
    shorter = [
        k for k in known if all(k[n] == result[n] for n in ("shape", "ratio")) and k["length"] < result["length"]
    ]
    if not shorter:
        return 0.0
    last = max(shorter, key=lambda k: k["length"])
    whole = sum(statistics.median(variant["generate"]) for variant in last["variants"].values())
    return whole * (result["length"] / last["length"]) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output-dir of scripts/benchmark.py")
    parser.add_argument("--presses", nargs="*", default=list(PRESSES), help="classes of kvpress")
    arguments = parser.parse_args()
    if not (arguments.folder / "plan.json").exists():
        sys.exit(f"error: there is no plan.json in {arguments.folder}: run scripts/benchmark.py first")
    import kvpress

    if unknown := [name for name in arguments.presses if not hasattr(kvpress, name)]:
        sys.exit(f"error: kvpress has no {unknown}; --presses takes its classes, such as SnapKVPress")
    plan = json.loads((arguments.folder / "plan.json").read_text())
    output = arguments.folder / "kvpress.json"
    settings = {name: plan[name] for name in ("attn_implementation", "new_tokens")} | {"presses": arguments.presses}
    known = json.loads(output.read_text()) if output.exists() else []
    known = [result for result in known if result["settings"] == settings]
    for name, fields in plan["shapes"].items():
        shape = shapes.ModelShape(**fields)
        model = build_model(plan, shape)
        place: dict[str, Any] = {"shape": name, "dtype": str(model.dtype).removeprefix("torch.")}
        place["device"] = model.device.type
        for ratio in plan["ratios"]:
            for length in sorted(plan["lengths"]):
                result = {**place, "length": length, "ratio": ratio, "settings": settings}
                if any(all(k[n] == result[n] for n in (*place, "length", "ratio")) for k in known):
                    continue
                if (seconds := predicted(known, result)) > plan["max_seconds"]:
                    print(f"left out, {name}, {length:,} tokens: a round is predicted to take {seconds:,.0f} s")
                    continue
                measured = measure(plan, model, length, ratio, arguments.presses)
                known.append({**result, "provenance": provenance(), **measured})
                temporary = output.with_name(output.name + ".tmp")
                temporary.write_text(json.dumps(known, indent=1) + "\n")
                temporary.replace(output)
                print(f"{name}, {length:,} tokens, {ratio:g}x: measured")


if __name__ == "__main__":
    main()
