"""The embedded checkpoint's planner and tokenizer, and a browser where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from semtoken_hf import SpanPlanner
from tests.fixtures.browser import Browser, browser, find_browser
from tests.fixtures.children import ROOT

FOLDER = ROOT / "model_cards" / "semtoken-llama-tiny"


@pytest.fixture(scope="session")
def planner() -> SpanPlanner:
    # Short spans of several sizes.
    return SpanPlanner.from_pretrained(FOLDER, {"segmentation_mode": "greedy", "max_span_length": 16})


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started
