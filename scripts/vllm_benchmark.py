#!/usr/bin/env python
"""Time to the first token and throughput of an OpenAI-compatible server, compressed and plain in turn.

    python scripts/vllm_benchmark.py http://127.0.0.1:8000 --model my-plain --clients 8 20 50

The server compresses: vLLM with the plugin, or `semtoken serve`. Plain requests go to the same server, with
`"compression": false`. Every client sends one prompt of its own, all at once, and reads the stream to its end; the
prompts differ from their first words, so that no prefix cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
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


async def measure(
    url: str, model: str, clients: int, max_tokens: int, round_name: str, **fields: Any
) -> dict[str, Any]:
    """The figures of so many clients at once."""
    chapter = CHAPTER.read_text(encoding="utf-8")
    bodies = [
        {"model": model, "prompt": f"{round_name}, reader {number}.\n\n{chapter}", "max_tokens": max_tokens, **fields}
        for number in range(clients)
    ]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
        seconds = time.perf_counter() - begin
    first = sorted(answer.first for answer in answers)
    return {
        "clients": clients,
        "prompt_tokens": answers[0].usage["prompt_tokens"],
        "first_token_median_s": statistics.median(first),
        "first_token_last_s": first[-1],
        "seconds": seconds,
        "new_tokens_per_s": sum(answer.usage["completion_tokens"] for answer in answers) / seconds,
        "requests_per_s": clients / seconds,
    }


def benchmark(url: str, model: str, clients: list[int], max_tokens: int) -> list[dict[str, Any]]:
    """The rows of the table, each printed as soon as it is known."""
    print("| clients | prompt | positions | first token, median | last | all done | new tokens/s | requests/s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for number in clients:
        for name, is_compressed in (("plain", False), ("SemToken", True)):
            round_name = f"{name}, {number} clients"
            row = asyncio.run(measure(url, model, number, max_tokens, round_name, compression=is_compressed))
            rows.append({"prompt": name, **row})
            print(
                f"| {number} | {name} | {row['prompt_tokens']:,} | {row['first_token_median_s']:.1f} s "
                f"| {row['first_token_last_s']:.1f} s | {row['seconds']:.1f} s | {row['new_tokens_per_s']:.1f} "
                f"| {row['requests_per_s']:.2f} |",
                flush=True,
            )
    return rows


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
