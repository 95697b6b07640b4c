"""A SemToken folder that an engine can serve, for the tests of plugin and proxy."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conversion.checkpoints import edit_json
from tests.fixtures.evaluation_data import EMBEDDED

# The extra `proxy`.
if not all(map(find_spec, ("starlette", "uvicorn", "httpx", "prometheus_client"))):
    collect_ignore = ["test_proxy.py", "test_vllm_plugin.py"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
)


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, with compact positions and a chat template."""
    folder = tmp_path_factory.mktemp("engine") / "my-semtoken"
    shutil.copytree(EMBEDDED, folder)
    edit_json(folder / "config.json", position_mode="compact", adapted_for=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
