"""Servers that documents talk to: `transformers serve` itself, in this process, and a stand-in for vLLM."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class InProcessServer:
    """`transformers serve`, without a socket: its application answers real clients directly.

    Args:
        patch: `uvicorn` and `openai` are changed until the test ends.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        import openai
        import uvicorn
        from fastapi.testclient import TestClient

        self.app: Any = None
        config = uvicorn.Config

        def configure(app: Any, *args: Any, **kwargs: Any) -> Any:
            self.app = app
            return config(app, *args, **kwargs)

        patch.setattr(uvicorn, "Config", configure)
        patch.setattr(uvicorn.Server, "run", lambda _: None)

        def client(**options: Any) -> Any:
            transport = TestClient(self.app, base_url=options["base_url"])
            return openai.OpenAI(**options, http_client=transport)

        self.openai = SimpleNamespace(OpenAI=client)

    @staticmethod
    def transformers(arguments: list[str], _: str) -> str:
        """The program `transformers`."""
        from transformers.cli.transformers import app

        app(arguments, standalone_mode=False)
        return ""


class StandInEngine:
    """What vLLM does with prompt embeddings, by Transformers: the plain model reads them at positions 0 .. m-1."""

    def __init__(self, model: str, enable_prompt_embeds: bool = False):
        assert enable_prompt_embeds, "vLLM refuses prompt embeddings unless it is told to take them"
        self.model = AutoModelForCausalLM.from_pretrained(model)
        assert self.model.config.model_type == "llama", "vLLM runs the plain model"

    def generate(self, prompt: dict[str, Tensor]) -> Any:
        """As `LLM.generate`."""
        embeds = prompt["prompt_embeds"]
        assert embeds.shape[-1] == self.model.config.hidden_size
        return self.model.generate(inputs_embeds=embeds[None].to(self.model.dtype), max_new_tokens=4)

    def complete(self, body: dict[str, Any]) -> Any:
        """As `/v1/completions`."""
        assert body.get("prompt") is None
        content = base64.b64decode(body["prompt_embeds"], validate=True)
        return self.generate({"prompt_embeds": torch.load(io.BytesIO(content), weights_only=True)})

    def curl(self, arguments: list[str], stdin: str) -> str:
        """`curl URL ... -d @-`."""
        assert arguments[0].endswith("/v1/completions")
        assert arguments[-2:] == ["-d", "@-"]
        return str(self.complete(json.loads(stdin)).tolist()) + "\n"
