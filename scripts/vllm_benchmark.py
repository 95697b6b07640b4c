#!/usr/bin/env python
"""Time to the first token, throughput and KV memory of an OpenAI-compatible server, compressed and plain in turn.

    python scripts/vllm_benchmark.py http://127.0.0.1:8000 --model my-plain --clients 8 20 50

The server compresses: vLLM with the plugin, or `semtoken serve`. Plain requests go to the same server, with
`"compression": false`. Every client sends one prompt of its own, all at once, and reads the stream to its end. The
prompts are one chapter, begun at another place by each client, so that no prefix cache helps. The KV peak is the most
positions that the requests held at once, by vLLM's /metrics; other servers do not tell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

CHAPTER = Path(__file__).parent / "quickstart_chapter.txt"


@dataclass(frozen=True)
class Answer:
    """One client's: seconds to its first token and to its end, and the usage that it was told."""

    first: float
    whole: float
    usage: dict[str, Any]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Send one request and read its stream.

    Raises:
        RuntimeError: it was refused, or its stream ended with an error.
    """
    begin, first, usage = time.perf_counter(), 0.0, None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(line)
            first = first or time.perf_counter() - begin
            usage = chunk.get("usage") or usage
    if usage is None:
        raise RuntimeError("the stream ended without its usage")
    return Answer(first, time.perf_counter() - begin, usage)


def prompts(number: int, rounds: int, this_round: int) -> list[str]:
    """The chapter as so many prompts, all begun at different places, also from those of the other rounds."""
    chapter = CHAPTER.read_text(encoding="utf-8")
    places = [len(chapter) * (this_round + rounds * i) // (rounds * number) for i in range(number)]
    return [f"{chapter[place:]}\n\n{chapter[:place]}" for place in places]


async def measure(url: str, texts: list[str], **fields: Any) -> dict[str, Any]:
    """The figures of one client for each text, all at once; `fields` are those of every request."""
    bodies = [{**fields, "prompt": text} for text in texts]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()
        watch = asyncio.create_task(watch_cache(client))
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
        seconds = time.perf_counter() - begin
        watch.cancel()
        peak = (await asyncio.gather(watch))[0]
    first = sorted(answer.first for answer in answers)
    return {
        "clients": len(texts),
        "prompt_tokens": statistics.median(answer.usage["prompt_tokens"] for answer in answers),
        "first_token_median_s": statistics.median(first),
        "first_token_last_s": first[-1],
        "seconds": seconds,
        "new_tokens_per_s": sum(answer.usage["completion_tokens"] for answer in answers) / seconds,
        "requests_per_s": len(texts) / seconds,
        "kv_peak": peak,
    }


async def watch_cache(client: httpx.AsyncClient) -> int:
    """The most positions that a vLLM holds in its KV cache until this is cancelled; 0: the server does not tell."""
    peak = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            text = (await client.get("/metrics")).text
            used = re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, re.MULTILINE)
            sizes = re.findall(r"^vllm:cache_config_info\{(.*)\} ", text, re.MULTILINE)
            for share, labels in zip(used, sizes, strict=False):
                block, blocks = (
                    int(re.findall(rf'{name}="(\d+)"', labels)[0]) for name in ("block_size", "num_gpu_blocks")
                )
                peak = max(peak, round(float(share) * block * blocks))
            await asyncio.sleep(0.5)
    return peak


def benchmark(url: str, model: str, clients: list[int], max_tokens: int) -> list[dict[str, Any]]:
    """The rows of the table, each printed as soon as it is known."""
    print(
        "| clients | prompt | positions | KV peak | first token, median | last | all done | new tokens/s | requests/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows, fields = [], {"model": model, "max_tokens": max_tokens}
    for this_round, number in enumerate(clients):
        texts = prompts(number, len(clients), this_round)
        for name, is_compressed in (("plain", False), ("SemToken", True)):
            row = asyncio.run(measure(url, texts, compression=is_compressed, **fields))
            rows.append({"prompt": name, **row})
            print(
                f"| {number} | {name} | {row['prompt_tokens']:,.0f} | {row['kv_peak']:,} "
                f"| {row['first_token_median_s']:.1f} s | {row['first_token_last_s']:.1f} s | {row['seconds']:.1f} s "
                f"| {row['new_tokens_per_s']:.1f} | {row['requests_per_s']:.2f} |",
                flush=True,
            )
    print(f"\n{circumstances(url)}", flush=True)
    return rows


def circumstances(url: str) -> str:
    """Versions of the server and of what it stands on, if that is installed here, machine and date."""
    engine = httpx.get(f"{url}/version", timeout=60).json().get("version")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return (
        f"- versions: `vllm {engine}, python {platform.python_version()}, {versions}`\n"
        f"- machine: `{cpu}, {os.cpu_count()} threads; load at the end {os.getloadavg()[0]:.0f}`\n"
        f"- date: `{datetime.date.today()}`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("--model", required=True, help="its name for the model")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 20, 50], help="at once (default 8 20 50)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of every answer (default 16)")
    arguments = parser.parse_args()
    benchmark(arguments.url, arguments.model, arguments.clients, arguments.max_tokens)


if __name__ == "__main__":
    main()
