"""`transformers serve` on a converted folder, in a process where this package is not installed, asked by real clients.

The compressed answer differs from the plain one, so that an answer equal to `generate` proves that the prompt shrank.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.tiny import tiny_model, tiny_tokenizer

REASON = "`transformers serve` and its client need the extra `serve`"
openai = pytest.importorskip("openai", reason=REASON)
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=REASON)

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TEXT = "the cat sat on the mat and the dog ran to the man " * 6
CHAT = [{"role": "user", "content": TEXT}]
NEW = 8
SMALL_PAGES = ["--cb-num-blocks", "16", "--cb-block-size", "32", "--cb-max-batch-tokens", "256"]


class Checkpoint:
    """A converted folder, and what `generate` says to a prompt by hand."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.tokenizer = folder, tiny_model(), tiny_tokenizer()
        self.tokenizer.chat_template = TEMPLATE
        # Random bytes are seldom UTF-8, and a stream may not end within a character.
        self.tokenizer.backend_tokenizer.decoder = None
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def encode(self, prompt: str | list[dict], **template_arguments):
        if isinstance(prompt, str):
            return self.tokenizer(prompt, return_tensors="pt")
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_arguments
        )

    def answer(self, prompt: str | list[dict], template_arguments: dict | None = None, **arguments) -> str:
        encoding = self.encode(prompt, **template_arguments or {})
        tokens = self.model.generate(**encoding, max_new_tokens=NEW, do_sample=False, **arguments)
        return self.tokenizer.decode(tokens[0, encoding["input_ids"].shape[1] :], skip_special_tokens=True)


class Server:
    """A running server and real clients of it."""

    def __init__(self, address: str, checkpoint: Checkpoint, log: Path):
        self.address, self.checkpoint, self.log = address, checkpoint, log
        self.shared = {"model": str(checkpoint.folder), "max_tokens": NEW, "temperature": 0}

    @property
    def client(self) -> openai.OpenAI:
        # A new one each time: the server closes the connection behind an error.
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)

    def chat(self, messages: list[dict], **arguments):
        return self.client.chat.completions.create(messages=messages, **self.shared, **arguments)

    def complete(self, prompt: str, **arguments):
        return self.client.completions.create(prompt=prompt, **self.shared, **arguments)

    def warnings(self) -> list[str]:
        lines = [line.removeprefix("[transformers] ") for line in self.log.read_text().splitlines()]
        return [line for line in lines if line.startswith("SemToken")]


def wait_for_address(child: subprocess.Popen, log: Path, seconds: float = 300) -> str:
    """The address that the server prints once it listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None:
        if found := re.search(r"running on (http://[\d.]+:\d+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    child.send_signal(signal.SIGABRT)  # faulthandler then says where it stands
    child.wait(30)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-8000:]}")


@contextmanager
def serving(checkpoint: Checkpoint, home: Path, *options: str) -> Iterator[Server]:
    """`transformers serve` in a child process on a free port of the loopback, offline."""
    (home / "hub").mkdir(parents=True)
    log = home / "log.txt"
    command = [sys.executable, "-X", "faulthandler", "-m", "transformers.cli.transformers", "serve"]
    command += [str(checkpoint.folder), "--trust-remote-code", *options]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=home, env=environment)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "*")
            yield Server(wait_for_address(child, log), checkpoint, log)
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Server]:
    with serving(checkpoint, tmp_path_factory.mktemp("home")) as server:
        yield server


def test_chat_is_compressed(server, checkpoint):
    answer = server.chat(CHAT)
    expected = checkpoint.answer(CHAT)
    assert answer.choices[0].message.content == expected
    assert expected != checkpoint.answer(CHAT, compression=False)
    # What is billed is what was sent.
    assert answer.usage.prompt_tokens == checkpoint.encode(CHAT)["input_ids"].shape[1]


def test_chat_streams(server, checkpoint):
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.chat(CHAT, stream=True)]
    assert "".join(pieces) == checkpoint.answer(CHAT)
    assert len([piece for piece in pieces if piece]) > 1


def test_completions_with_and_without_a_stream(server, checkpoint):
    expected = checkpoint.answer(TEXT)
    assert expected != checkpoint.answer(TEXT, compression=False)
    assert server.complete(TEXT).choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in server.complete(TEXT, stream=True)) == expected


def test_a_second_turn_reads_the_whole_chat(server, checkpoint):
    """The server keeps no cache between requests: both turns are planned together."""
    first = server.chat(CHAT).choices[0].message.content
    chat = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "and the dog ? " * 6}]
    expected = checkpoint.answer(chat)
    assert server.chat(chat).choices[0].message.content == expected
    assert expected not in (first, checkpoint.answer(chat, compression=False))


def test_requests_at_once_do_not_disturb_each_other(server, checkpoint):
    prompts = [TEXT, "the dog " * 60, "the man sat " * 40, "the mat"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt).choices[0].text, prompts))
    assert answers == [checkpoint.answer(prompt) for prompt in prompts]
    assert len(set(answers)) == len(prompts)


@pytest.mark.parametrize("fields", [{"target_ratio": 4.0}, {"compression": False}], ids=str)
def test_a_client_sets_our_options_in_its_generation_config(server, checkpoint, fields):
    answer = server.complete(TEXT, extra_body={"generation_config": json.dumps(fields)}).choices[0].text
    assert answer == checkpoint.answer(TEXT, **fields)
    assert answer != checkpoint.answer(TEXT)


@pytest.mark.parametrize(
    "arguments",
    [{"chat_template": "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"}, {"return_query_mask": True}],
    ids=["a template of its own", "the question marked"],
)
def test_a_client_sets_how_its_chat_is_rendered(server, checkpoint, arguments):
    """`--chat-template-kwargs` of the server sets the same for all clients."""
    chat = [{"role": "system", "content": TEXT}, {"role": "user", "content": "and the dog ran to the cat ?"}]
    answer = server.chat(chat, extra_body={"chat_template_kwargs": arguments}).choices[0].message.content
    assert answer == checkpoint.answer(chat, arguments)
    assert answer != checkpoint.answer(chat)


def test_plain_http(server, checkpoint):
    def post(**body) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{server.address}/v1/completions",
            json.dumps({**server.shared, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    status, body = post(prompt=TEXT)
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, checkpoint.answer(TEXT))
    status, body = post(prompt=TEXT, target_ratio=4.0)
    assert status == 422, body
    assert "target_ratio" in body


def test_a_bad_ratio_fails_that_request_alone(server, checkpoint):
    body = {"generation_config": json.dumps({"target_ratio": 0.5})}
    with pytest.raises(openai.InternalServerError):
        server.complete(TEXT, extra_body=body)
    with pytest.raises(openai.APIError) as failed:
        list(server.complete(TEXT, stream=True, extra_body=body))
    assert "`target_ratio` must be a finite number >= 1" in str(failed.value.body)
    assert server.complete(TEXT).choices[0].text == checkpoint.answer(TEXT)
    assert not server.warnings()


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--compile"], "a StaticCache cannot hold merged slots"), (["--continuous-batching", *SMALL_PAGES], "paged")],
    ids=["compile", "continuous_batching"],
)
def test_other_caches_answer_compressed_or_exactly_plain_with_a_warning(checkpoint, tmp_path, options, reason):
    with serving(checkpoint, tmp_path, *options) as server:
        answers = [server.chat(CHAT).choices[0].message.content for _ in range(2)]
    assert answers[0] == answers[1]
    if answers[0] != checkpoint.answer(CHAT):
        assert answers[0] == checkpoint.answer(CHAT, compression=False)
        (warning,) = server.warnings()
        assert "runs the plain model exactly" in warning
        assert reason in warning
