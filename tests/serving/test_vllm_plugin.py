"""Requests to a server with the plugin in it, a stand-in for vLLM's: what reaches the engine, and what comes back."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import tomllib
import torch
from starlette.testclient import TestClient
from transformers import AutoModel, AutoTokenizer

from semtoken_hf.serving.prompt_embeds import export_prompt
from semtoken_hf.serving.vllm_plugin import SemTokenEndpointPlugin
from tests.fixtures.children import ROOT
from tests.fixtures.evaluation_data import EMBEDDED
from tests.fixtures.logs import warnings_of
from tests.fixtures.text import PROSE
from tests.serving.stand_in import digest, stand_in

TEXT = PROSE + PROSE[:200]
CHAT = [{"role": "system", "content": PROSE}, {"role": "user", "content": "Who has taken Netherfield Park?"}]


@pytest.fixture(scope="module")
def plugin(engine_folder):
    """As vLLM loads it: by its entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["vllm.endpoint_plugins"]["semtoken"]
    plugin = EntryPoint("semtoken", value, "vllm.endpoint_plugins").load()()
    assert isinstance(plugin, SemTokenEndpointPlugin)
    plugin.app = stand_in()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMTOKEN_CHECKPOINT", str(engine_folder))
        plugin.attach_router(plugin.app)
    return plugin


@pytest.fixture
def client(plugin):
    plugin.app.state.seen.clear()
    return TestClient(plugin.app)


@pytest.fixture(scope="module")
def export(engine_folder):
    """What `export_prompt` makes of a prompt: the stand-in's answer, slots, tokens."""
    model = AutoModel.from_pretrained(engine_folder, num_hidden_layers=0).eval()
    tokenizer = AutoTokenizer.from_pretrained(engine_folder)

    def export(prompt, **arguments):
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_query_mask=True, return_dict=True, return_tensors="pt"
            )
        exported = export_prompt(model, tokenizer, prompt, **arguments)
        rows = exported.prompt_embeds.contiguous().view(torch.uint8).numpy().tobytes()
        return digest(rows), len(exported.prompt_embeds), exported.original_length

    export.tokenizer = tokenizer
    return export


def usage_of(*exported):
    """The usage of prompts."""
    slots = sum(e[1] for e in exported)
    details = {"original_tokens": sum(e[2] for e in exported)}
    return {"prompt_tokens": slots, "total_tokens": slots + 4, "completion_tokens": 4, "prompt_tokens_details": details}


def test_text_ids_and_lists_of_them(client, export):
    one, other = export(TEXT), export(PROSE[:1200])
    assert one[1] < one[2]
    ids = export.tokenizer(TEXT)["input_ids"]
    for prompt, expected in [
        (TEXT, [one]),
        (ids, [one]),
        ([TEXT, PROSE[:1200]], [one, other]),
        ([ids, ids], [one, one]),
    ]:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": prompt, "max_tokens": 4}).json()
        assert [choice["text"] for choice in answer["choices"]] == [e[0] for e in expected]
        assert answer["usage"] == usage_of(*expected)
    assert client.app.state.seen == [{"model": "m", "max_tokens": 4}] * 4


@pytest.mark.parametrize("form", ["text", "parts"])
def test_a_chat_is_answered_as_one(client, export, form):
    chat = CHAT
    if form == "parts":
        chat = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    body = {"model": "m", "messages": chat, "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = export(CHAT)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected[0]}
    assert choice["logprobs"]["content"][0]["top_logprobs"][1] == {"token": "b", "logprob": -2.0, "bytes": [98]}
    assert (answer["object"], answer["id"], answer["usage"]) == ("chat.completion", "chatcmpl-1", usage_of(expected))
    assert client.app.state.seen == [{"model": "m", "max_tokens": 7, "logprobs": 2}]
    # As much as there is room for, which is not what a completion does by itself.
    client.post("/v1/chat/completions", json={"messages": chat})
    assert client.app.state.seen[1] == {"max_tokens": None}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams(client, export, path):
    is_chat, options = "chat" in path, {"stream": True, "stream_options": {"include_usage": True}}
    body = {"messages": CHAT} if is_chat else {"prompt": [TEXT, TEXT]}
    with client.stream("POST", path, json={**body, **options}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks, expected = [json.loads(line) for line in lines], export(CHAT if is_chat else TEXT)
    usage = chunks.pop()["usage"]
    assert usage == usage_of(*[expected] * (2 - is_chat))
    for index in range(2 - is_chat):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        pieces = [choice["delta"] if is_chat else {"content": choice["text"]} for choice in choices]
        assert "".join(piece["content"] for piece in pieces) == expected[0]
        assert not is_chat or [piece.get("role") for piece in pieces] == ["assistant", None, None, None]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if is_chat else "text_completion"}


def test_fields_of_a_request(client, export, caplog):
    answer, expected = (
        client.post("/v1/completions", json={"prompt": TEXT, "target_ratio": 4}).json(),
        export(TEXT, target_ratio=4.0),
    )
    assert (answer["choices"][0]["text"], answer["usage"]) == (expected[0], usage_of(expected))
    for prompt, extra in [(TEXT, {"compression": False}), ("short", {})]:
        answer = client.post("/v1/completions", json={"prompt": prompt, **extra}).json()
        assert answer["choices"][0]["text"] == "plain"
        assert "prompt_tokens_details" not in answer["usage"]
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXT, "echo": True}),
        ("/v1/completions", {"prompt": TEXT, "suffix": "."}),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}),
        ("/v1/chat/completions", {"messages": [*CHAT, {"role": "tool", "content": "4"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/v1/responses", {"messages": CHAT}),
    ],
)
def test_what_stays_plain_says_so_once(client, caplog, path, body):
    for _ in range(2):
        answer = client.post(path, json=body)
        assert answer.json()["choices"][0]["text"].startswith("plain")
    (warning,) = warnings_of(caplog)
    assert "plain model" in warning
    assert client.app.state.seen == [body] * 2


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", "not json", "not JSON"),
        ("/v1/completions", [], "must be a JSON object"),
        ("/v1/completions", {}, "`prompt` is missing"),
        ("/v1/completions", {"prompt": ""}, "`prompt` is empty"),
        ("/v1/completions", {"prompt": [1, 10**6]}, "token ids from 0 to 8191, got 1000000"),
        ("/v1/completions", {"prompt": [TEXT, 3.5]}, "text or token ids"),
        ("/v1/completions", {"prompt": TEXT, "target_ratio": 0.5}, "`target_ratio` must be"),
        ("/v1/completions", {"prompt": TEXT, "compression": "no"}, "`compression` must be"),
        ("/v1/completions", {"prompt": TEXT, "prompt_embeds": "AAAA"}, "not taken from clients"),
        ("/v1/responses", {"input": [{"content": [{"type": "prompt_embeds"}]}]}, "not taken from clients"),
        ("/v1/chat/completions", {"messages": []}, "`messages` must be"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "with a `role`"),
        ("/v1/chat/completions", {"messages": CHAT, "chat_template": "{{ 1 }}"}, "template applies"),
        ("/v1/chat/completions", {"messages": CHAT, "chat_template_kwargs": {"tokenize": False}}, "template applies"),
    ],
)
def test_bad_input_is_a_400_that_says_what(client, path, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content.encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert client.app.state.seen == []


def served(config, **fields):
    """What vLLM gives a plugin, for a model of that configuration."""
    names = ("hidden_size", "vocab_size", "num_hidden_layers")
    sizes = {name: getattr(config, name) for name in names} | {"model_type": "llama"} | fields
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**sizes)))


def test_a_server_that_cannot_read_the_slots_does_not_start(plugin, monkeypatch, caplog):
    args, config = SimpleNamespace(enable_prompt_embeds=True, reasoning_parser="qwen3"), plugin.config
    asyncio.run(plugin.init_state(served(config), None, args))
    assert "--reasoning-parser does not reach compressed chats" in warnings_of(caplog)[0]
    for client, options, message in [
        (served(config, hidden_size=512), args, "hidden_size 512, not 256"),
        (served(config, model_type=config.model_type), args, "`semtoken export` writes"),
        (served(config), SimpleNamespace(enable_prompt_embeds=False), "--enable-prompt-embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            asyncio.run(plugin.init_state(client, None, options))
    for checkpoint, message in [(None, "set SEMTOKEN_CHECKPOINT"), (EMBEDDED, "position_mode='original'")]:
        monkeypatch.setenv("SEMTOKEN_CHECKPOINT", str(checkpoint or ""))
        with pytest.raises(ValueError, match=message):
            SemTokenEndpointPlugin().attach_router(stand_in())
