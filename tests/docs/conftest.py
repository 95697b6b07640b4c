"""A place where a document's blocks can run: real things under the names that the document uses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tests.docs.named_things import CHAPTER, NamedThings, working_directory
from tests.docs.reader import Reader
from tests.docs.servers import InProcessServer
from tests.fixtures.evaluation_data import EMBEDDED
from tests.hub.hub_server import HubServer

QUESTION = "\nQuestion: Who has written the book that Sherwood reads?\nAnswer:"


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> NamedThings:
    return NamedThings(tmp_path_factory.mktemp("things"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote_modules: Path) -> Path:
    """The working directory, which looks like a clone."""
    made = working_directory(tmp_path / "clone")
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptation's defaults, where a command leaves them out: a test has no time for 300 steps."""
    from semtoken_hf.training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments

    steps = {"max_steps": 2, "per_device_train_batch_size": 1, "bf16": False, "save_steps": 2, "eval_steps": 2}
    windows = {"evaluation_windows": 1, "held_out_share": 0.3, "context_length": 512}
    for arguments, fields in ((AdaptationTrainingArguments, steps), (AdaptationArguments, windows)):
        make = functools.partialmethod(_with_defaults, arguments.__init__, fields)
        monkeypatch.setattr(arguments, "__init__", make)
        for name, value in fields.items():  # a parser reads them here
            monkeypatch.setattr(arguments.__dataclass_fields__[name], "default", value)


def _with_defaults(self: Any, make: Any, fields: dict[str, Any], /, *args: Any, **kwargs: Any) -> None:
    make(self, *args, **{**fields, **kwargs})


@pytest.fixture
def namespace() -> dict[str, Any]:
    """What the documents' Python blocks take as given."""
    half = len(CHAPTER) // 2
    return {
        "long_prompt": CHAPTER,
        "question": QUESTION,
        "documents": [CHAPTER[:half], CHAPTER[half:], CHAPTER[: half // 2]],
        "messages": [
            {"role": "system", "content": "You answer from the chapter."},
            {"role": "user", "content": CHAPTER[:half]},
            {"role": "assistant", "content": "I have read it."},
            {"role": "user", "content": "Who has written the book that Sherwood reads?"},
        ],
    }


@pytest.fixture
def reader(
    folder: Path,
    things: NamedThings,
    hub: HubServer,
    namespace: dict[str, Any],
    short_runs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reader]:
    """Runs the blocks of one document."""
    server = InProcessServer(monkeypatch)
    verbosity = logging.get_verbosity()
    yield Reader(folder, things, hub, namespace, monkeypatch, server)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The checkpoint that ships and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED)
