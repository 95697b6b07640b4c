"""`scripts/export_prompt_embeds.py` in a process of its own."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from semtoken_hf.serving.prompt_embeds import decode_prompt_embeds, export_prompt
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_script as run_child
from tests.fixtures.scripts import main_of
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

SCRIPT = "export_prompt_embeds.py"
TEXT = "the cat sat on the mat and the dog ran to the man " * 6


@pytest.fixture
def run_script(monkeypatch, capsysbinary):
    """A function that runs the script in this process: arguments and standard input -> code, output, errors."""
    main, verbosity = main_of(SCRIPT, monkeypatch), logging.get_verbosity()

    def run(*arguments, stdin: str = TEXT) -> tuple[int, bytes, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = 0
        try:
            main(*arguments)
        except SystemExit as stopped:
            code = stopped.code
        written = capsysbinary.readouterr()
        return code, written.out, written.err.decode().splitlines()

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "semtoken"
    tiny_model().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_request_and_the_plain_model_that_answers_it(folder, tmp_path):
    """In a process of its own, from standard input to standard output: with the plain folder, what `generate` says."""
    options = ["--export-plain", tmp_path / "plain", "--format", "json", "--model", "served"]
    result = run_child(SCRIPT, folder, "-", *options, "--max-tokens", "9", "--target-ratio", "3", stdin=TEXT)
    request = json.loads(result.stdout)
    embeds = decode_prompt_embeds(request.pop("prompt_embeds"))
    assert request == {"model": "served", "max_tokens": 9}

    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    slots = -(-ids.shape[1] // 3)
    report = result.stderr.splitlines()[-1]
    assert report.startswith(f"{ids.shape[1]} tokens, {slots} slots, ratio {ids.shape[1] / slots:.2f}, torch.float32, ")
    assert report.endswith(f" {len(result.stdout.encode())} bytes")
    model = AutoModelForCausalLM.from_pretrained(folder, position_mode="compact")
    expected = model.generate(ids, max_new_tokens=9, target_ratio=3.0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    answer = plain.generate(inputs_embeds=embeds[None], max_new_tokens=9)
    assert torch.equal(answer[0], expected[0, ids.shape[1] :])


def test_a_chat_as_a_tensor_in_a_file(run_script, folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out.pt"
    options = ["--format", "pt", "--chat", "--dtype", "bfloat16", "--output", out]
    assert run_script(folder, tmp_path / "text", *options)[:2] == (0, b"")
    chat = [{"role": "user", "content": TEXT}]
    expected = export_prompt(tiny_model(), AutoTokenizer.from_pretrained(folder), chat, dtype=torch.bfloat16)
    assert torch.equal(torch.load(out, weights_only=True), expected.prompt_embeds)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.pt", "text"]


def test_base64_and_a_ratio_that_cannot_be_met(run_script, folder):
    code, written, errors = run_script(folder, "-", "--target-ratio", "40")
    expected = export_prompt(tiny_model(), AutoTokenizer.from_pretrained(folder), TEXT, target_ratio=40.0)
    assert code == 0
    assert torch.equal(decode_prompt_embeds(written.strip()), expected.prompt_embeds)
    assert errors[-1].endswith("forbid the ratio that was asked for")


@pytest.mark.parametrize("mistake", ["an adapter", "`target_ratio` must be", "nowhere"])
def test_mistakes_end_with_one_line_and_no_file(run_script, folder, tmp_path, mistake):
    out, options = tmp_path / "out", []
    if mistake == "an adapter":
        folder = tmp_path / "adapted"
        adapted_model().save_pretrained(folder)
    elif mistake == "nowhere":
        folder = tmp_path / "nowhere"
    else:
        options = ["--target-ratio", "0.5"]
    code, written, errors = run_script(folder, "-", "--output", out, *options)
    assert (code, written) == (1, b"")
    assert errors[-1].startswith("export_prompt_embeds.py: error: ")
    assert mistake in errors[-1]
    assert not list(tmp_path.glob("out*"))
