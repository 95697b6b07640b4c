"""`semtoken serve` in front of stand-ins for vLLM, each a process of its own on the loopback."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from semtoken_hf.serving.proxy import build_proxy
from semtoken_hf.serving.request_compression import RequestCompressor
from tests.fixtures.children import ROOT
from tests.fixtures.command_line import end_of, start_command
from tests.fixtures.scripts import main_of
from tests.fixtures.text import PROSE

PATH, BODY = "/v1/completions", {"prompt": PROSE}
SLOW = {**BODY, "user": "slow"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


class Engine:
    """A stand-in in a process of its own."""

    def __init__(self):
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "tests.serving.stand_in", port]
        self.process = subprocess.Popen(command, cwd=ROOT)

    def state(self) -> dict:
        return httpx.get(f"{self.url}/health").json()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def engines(number: int) -> Iterator[list[Engine]]:
    started = [Engine() for _ in range(number)]
    try:
        for engine in started:
            wait_for(lambda engine=engine: answers(f"{engine.url}/health"))
        yield started
    finally:
        for engine in started:
            engine.kill()


@pytest.fixture(scope="module")
def compressor(engine_folder) -> RequestCompressor:
    return RequestCompressor(str(engine_folder))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engines(1) as (engine,):
        yield engine


@contextmanager
def proxy(compressor, *urls: str, **options) -> Iterator[str]:
    """The address of a proxy in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = build_proxy(compressor, list(urls), **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def post(url: str, body: dict = BODY, **options) -> httpx.Response:
    return httpx.post(f"{url}{PATH}", json=body, **{"timeout": 60, **options})


def test_an_answer_its_metrics_and_its_health(compressor, engine):
    with proxy(compressor, f"{engine.url}/v1/") as url:
        answer = post(url).json()
        slots = answer["usage"]["prompt_tokens"]
        tokens = answer["usage"]["prompt_tokens_details"]["original_tokens"]
        assert slots == -(-tokens * 10 // 24)
        with httpx.stream("POST", url + PATH, json={**BODY, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
        assert httpx.get(f"{url}/health").json() == {"engines": {engine.url: True}}
        metrics = httpx.get(f"{url}/metrics").text
        assert f"semtoken_slots_total {2.0 * slots}" in metrics
        assert f"semtoken_original_tokens_total {2.0 * tokens}" in metrics
        assert post(url, {}).status_code == 400
        assert httpx.post(f"{url}/v1/nowhere", json={}).status_code == 404


def test_openais_own_client(compressor, engine):
    openai = pytest.importorskip("openai")
    with proxy(compressor, engine.url) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chat = [{"role": "user", "content": PROSE}]
        usages = [
            client.chat.completions.create(model="m", messages=chat, extra_body=extra).usage
            for extra in ({}, {"target_ratio": 4.0})
        ]
        with pytest.raises(openai.BadRequestError, match="`target_ratio` must be a finite number >= 1"):
            client.completions.create(model="m", prompt=PROSE, extra_body={"target_ratio": 0})
    tokens = {usage.prompt_tokens_details.original_tokens for usage in usages}
    assert len(tokens) == 1
    assert tokens.pop() > usages[0].prompt_tokens > usages[1].prompt_tokens


def test_fifty_clients_at_once(compressor, engine):
    """Equal prompts are equal to the bit, which a prefix cache lives on."""

    async def ask(url: str) -> list[str]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            answers = await asyncio.gather(*(client.post(url + PATH, json=BODY) for _ in range(50)))
        return [answer.json()["choices"][0]["text"] for answer in answers]

    with proxy(compressor, engine.url) as url:
        assert len(set(asyncio.run(ask(url)))) == 1


def test_an_engine_that_is_killed(compressor):
    with engines(2) as (first, second), proxy(compressor, first.url, second.url) as url:
        with httpx.stream("POST", url + PATH, json={**SLOW, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            first.kill()  # the one that answers, both being idle
            last = [line for line in lines if line][-1]
        assert "the engine ended the stream" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert [post(url).status_code for _ in range(4)] == [200] * 4
        assert httpx.get(f"{url}/health").json()["engines"] == {first.url: False, second.url: True}
        second.kill()
        answer = post(url)
        assert (answer.status_code, answer.json()["error"]["message"]) == (502, "no engine can be reached: see /health")
        assert httpx.get(f"{url}/health").status_code == 503


def test_an_engine_that_dies_or_is_silent_before_it_answers(compressor):
    with engines(1) as (engine,):
        with proxy(compressor, engine.url, timeout=0.2) as url:
            assert post(url, SLOW).status_code == 504
        with proxy(compressor, engine.url) as url:
            threading.Timer(0.2, engine.kill).start()
            assert post(url, SLOW).status_code == 502


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(compressor, engine, stream):
    before = engine.state()["left"]
    with proxy(compressor, engine.url) as url:
        if stream:
            with httpx.stream("POST", url + PATH, json={**SLOW, "stream": True}, timeout=60) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                post(url, SLOW, timeout=0.25)
        wait_for(lambda: engine.state()["left"] == before + 1, 5)
        wait_for(lambda: "semtoken_in_flight 0.0" in httpx.get(f"{url}/metrics").text, 5)


def test_the_benchmark_asks_plain_and_compressed(compressor, engine, monkeypatch, capsys):
    with proxy(compressor, engine.url) as url:
        main_of("vllm_benchmark.py", monkeypatch)(url, "--model", "m", "--clients", 1, 3)
    cells = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = [row[1:4] for row in cells if len(row) > 4 and row[1].isdigit()]
    assert [row[:2] for row in rows] == [["1", "plain"], ["1", "SemToken"], ["3", "plain"], ["3", "SemToken"]]
    positions = [int(row[2].replace(",", "")) for row in rows]
    assert positions[0] == positions[2]  # characters, in the stand-in
    assert 700 < positions[1] < 1400
    assert any("vllm of the stand-in" in row[0] for row in cells)


def test_a_full_queue(compressor, engine):
    async def ask(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(client.post(url + PATH, json=SLOW) for _ in range(5)))

    with proxy(compressor, engine.url, max_in_flight=2) as url:
        given = asyncio.run(ask(url))
        assert sorted(answer.status_code for answer in given) == [200, 200, 503, 503, 503]
        assert {answer.headers.get("retry-after") for answer in given if answer.status_code == 503} == {"1"}
        assert post(url).status_code == 200


def test_the_event_loop_is_never_blocked(compressor, engine, monkeypatch):
    """While a prompt is compressed, the same process answers others: here one that would wait for them for ever."""
    begun, answered, rewrite = threading.Event(), threading.Event(), compressor.rewrite

    def rewrite_after_the_others(*request):
        begun.set()
        assert answered.wait(60)
        return rewrite(*request)

    monkeypatch.setattr(compressor, "rewrite", rewrite_after_the_others)
    with proxy(compressor, engine.url) as url, httpx.Client() as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, url)
        assert begun.wait(60)
        assert client.get(f"{url}/metrics").status_code == 200
        assert not long.done()
        answered.set()
        assert long.result().status_code == 200


def test_the_command_lets_running_requests_end(engine_folder, engine):
    arguments = ["--upstream", engine.url, "--checkpoint", engine_folder, "--port", 0, "--json"]
    child = start_command("serve", *arguments)
    url = json.loads(child.stdout.readline())["address"]
    with httpx.stream("POST", url + PATH, json={**SLOW, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    code, _, errors = end_of(child)
    assert (code, errors.splitlines()[-1]) == (143, "terminated; every request that ran has ended")


def test_a_command_that_cannot_serve(engine_folder):
    child = start_command("serve", "--upstream", "localhost:8000", "--checkpoint", engine_folder)
    code, out, errors = end_of(child)
    assert (code, out) == (1, "")
    assert errors.splitlines()[-1].startswith("error: `--upstream` must be an address such as http://127.0.0.1:8000")
