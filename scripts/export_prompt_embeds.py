#!/usr/bin/env python
"""Compress a prompt and write it as prompt embeddings, for an inference engine such as vLLM.

    python scripts/export_prompt_embeds.py my-semtoken --export-plain my-plain               # once: what vLLM runs
    vllm serve my-plain --enable-prompt-embeds
    python scripts/export_prompt_embeds.py my-semtoken long.txt --format json --model my-plain --max-tokens 100 \\
        | curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d @-

Formats: `base64` is the field `prompt_embeds` of a request, `json` a whole body for /v1/completions, and `pt` a tensor
[slots, hidden] for `torch.load` and `LLM.generate({"prompt_embeds": tensor})`. The engine must run the plain model with
the same weights: the checkpoint that was converted, or what --export-plain writes. Its positions are 0..m-1, so adapt
with compact positions, the default; adapters for compressed rows (`--trainable lora`) cannot go along.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.conversion.plain import export_plain
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.serving.prompt_embeds import ExportedPrompt, check_config, export_prompt


def build_parser() -> argparse.ArgumentParser:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a SemToken checkpoint")
    parser.add_argument("text_file", nargs="?", help="the prompt, UTF-8; - for standard input")
    parser.add_argument("--chat", action="store_true", help="the text is a user's turn, for the chat template")
    parser.add_argument("--target-ratio", type=float, help="tokens per slot (default: the checkpoint's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--format", choices=("base64", "json", "pt"), default="base64")
    parser.add_argument("--output", default="-", help="file, or - for standard output (default)")
    parser.add_argument("--model", help="for json: the model's name in the engine (default: the checkpoint)")
    parser.add_argument("--max-tokens", type=int, default=128, help="for json (default 128)")
    parser.add_argument("--export-plain", metavar="DIR", help="write the plain model of the checkpoint to a new folder")
    return parser


def read_prompt(arguments: argparse.Namespace) -> ExportedPrompt:
    """Compress the text; of the model, only what compression needs is loaded."""
    check_config(AutoConfig.from_pretrained(arguments.checkpoint))
    file = arguments.text_file
    text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    prompt = text.decode("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModel.from_pretrained(arguments.checkpoint, num_hidden_layers=0).eval()
    return export_prompt(
        model,
        tokenizer,
        [{"role": "user", "content": prompt}] if arguments.chat else prompt,
        target_ratio=arguments.target_ratio,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
    )


def render(prompt: ExportedPrompt, arguments: argparse.Namespace) -> bytes:
    if arguments.format == "pt":
        return base64.b64decode(prompt.to_base64())
    if arguments.format == "base64":
        return prompt.to_base64().encode() + b"\n"
    request = prompt.to_request(arguments.model or arguments.checkpoint, max_tokens=arguments.max_tokens)
    return json.dumps(request).encode() + b"\n"


def write(content: bytes, output: str) -> None:
    """To standard output, or to a temporary neighbour of the file that is then renamed."""
    if output == "-":
        sys.stdout.buffer.write(content)
        return
    temporary = Path(f"{output}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.text_file is None and arguments.export_plain is None:
        parser.error("nothing to do: give a text file, --export-plain, or both")
    # Standard output is for the result, and the layers that stay unread are no news.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if arguments.export_plain is not None:
            folder = export_plain(arguments.checkpoint, arguments.export_plain)
            print(f"the plain model: {folder}", file=sys.stderr)
        if arguments.text_file is None:
            return
        prompt = read_prompt(arguments)
        content = render(prompt, arguments)
        write(content, arguments.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    slots = len(prompt.prompt_embeds)
    facts = f"{prompt.original_length} tokens, {slots} slots, ratio {prompt.original_length / slots:.2f}"
    unmet = "" if prompt.budget_met else "; protected tokens or the span cap forbid the ratio that was asked for"
    print(f"{facts}, {prompt.prompt_embeds.dtype}, {len(content)} bytes{unmet}", file=sys.stderr)


if __name__ == "__main__":
    main()
