"""The real client in this process, pointed at a loopback Hub: it reads HF_ENDPOINT only when it is imported."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.hf_api
import pytest
import transformers.utils.hub
from huggingface_hub import constants

from tests.hub.hub_server import HubServer


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path, token: str | None) -> None:
    """Until the test ends, Transformers and `huggingface_hub` talk to `hub` as the owner of `token`."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    if hasattr(transformers.utils.hub, "_hf_api"):
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
