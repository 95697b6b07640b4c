#!/usr/bin/env python
"""What compressing documents apart costs against compressing them together, and what a second question costs.

    bash scripts/reference_model.sh static
    python scripts/measure_prefixes.py --checkpoint FOLDER --text-file wiki.test.txt --output prefixes.md

The context of each window is cut into documents of equal length; the last tokens before the target are read whole, as a
question would be. The documents stand in their order, and in a shuffled one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf import CompressedPrefix
from semtoken_hf.benchmarking.clock import seconds_of
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.texts import add_text_arguments, load_windows

QUESTION = 32
READ = {
    "full": "nothing merged",
    "none": "no documents",
    "together": "compressed together",
    "apart": "compressed apart, joined as slots",
    "keys": "compressed and read apart, keys joined",
}


def with_keys_made_apart(model: Any, parts: list[CompressedPrefix]) -> CompressedPrefix:
    """The parts joined, but each read as if nothing stood before it: what moving cached keys would give."""
    joined, done, keys = model.join_prefixes(parts), 0, []
    for part in parts:
        end = done + part.compressed_length
        moved = model.join_prefixes([part])
        moved.prompt.position_ids = joined.prompt.position_ids[:, done:end]
        keys.append([(layer.keys, layer.values) for layer in moved.cache().layers])
        done = end
    joined.layers = [
        tuple(torch.cat(states, 2) for states in zip(*layer, strict=True)) for layer in zip(*keys, strict=True)
    ]
    return joined


@torch.no_grad()
def nats(model: Any, prefix: CompressedPrefix | None, rest: Tensor, target: int) -> float:
    """Mean loss of the last `target` tokens of `rest` [1, n], which is read whole behind a prefix."""
    options = {} if prefix is None else {"past_key_values": prefix}
    logits = model(rest[:, :-1], compression=None if prefix else False, **options).logits[0, -target:]
    return float(torch.nn.functional.cross_entropy(logits.double(), rest[0, -target:]))


def measure_loss(model: Any, windows: Tensor, context: int, target: int, documents: int) -> dict[str, list[float]]:
    """Losses of every window's target, and slots, by what was read and in which order."""
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for window in tqdm(windows, desc="window"):
        opening, rest = window[None, :1], window[None, context - QUESTION :]
        texts = window[None, 1 : context - QUESTION].tensor_split(documents, 1)
        for order in ("in order", "shuffled"):
            places = torch.arange(documents) if order == "in order" else torch.randperm(documents, generator=generator)
            chosen = [texts[place] for place in places.tolist()]
            whole = torch.cat([opening, *chosen], 1)
            parts = [model.compress_prefix(ids) for ids in (torch.cat([opening, chosen[0]], 1), *chosen[1:])]
            prefixes = {
                "full": model.compress_prefix(whole, target_ratio=1),
                "none": model.compress_prefix(opening),
                "together": model.compress_prefix(whole),
                "apart": model.join_prefixes(parts),
                "keys": with_keys_made_apart(model, parts),
            }
            for name, prefix in prefixes.items():
                found.setdefault(f"{name}, {order}", []).append(nats(model, prefix, rest, target))
                found.setdefault(f"slots of {name}, {order}", []).append(prefix.compressed_length)
    return found


def loss_table(found: dict[str, list[float]]) -> list[str]:
    """Rise in perplexity over the full context, paired difference to compressing together, and slots."""
    lines = ["| documents | slots | in order: cost | nats more than together | shuffled: cost | nats more |"]
    lines.append("|---" * 6 + "|")
    for name, title in READ.items():
        cells = [f"{statistics.mean(found[f'slots of {name}, in order']):,.0f}"]
        for order in ("in order", "shuffled"):
            these, full, together = (torch.tensor(found[f"{n}, {order}"]) for n in (name, "full", "together"))
            more = these - together
            cells.append(f"{100 * ((these.mean() - full.mean()).exp() - 1):+.1f} %")
            cells.append(f"{more.mean():+.3f} ± {more.std() / len(more) ** 0.5:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def measure_time(model: Any, window: Tensor, documents: int, repeats: int) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds to the first token of an answer, by how the context is read, in turn; bytes of the files."""
    context, question = window[None, :-QUESTION], window[None, -QUESTION:]
    prefix = model.compress_prefix(context)

    def answer(prefix: CompressedPrefix) -> None:
        model.generate(**prefix.inputs(question), max_new_tokens=1)

    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), [Path(folder, str(number)) for number in range(documents)]
        prefix.save(whole)
        for path, ids in zip(parts, context.tensor_split(documents, 1), strict=True):
            model.compress_prefix(ids).save(path, with_keys=False)
        calls: dict[str, Callable[[], Any]] = {
            "plain, any question": lambda: model.generate(window[None], compression=False, max_new_tokens=1),
            "compressed with each question": lambda: model.generate(window[None], max_new_tokens=1),
            "a prefix: the first question": lambda: answer(model.compress_prefix(context)),
            "a prefix: a further question": lambda: answer(prefix),
            "a prefix loaded with its keys": lambda: answer(model.load_prefix(whole)),
            "documents loaded as slots, joined": lambda: answer(
                model.join_prefixes([model.load_prefix(path) for path in parts])
            ),
            "the question alone": lambda: model.generate(question, compression=False, max_new_tokens=1),
        }
        seconds: dict[str, list[float]] = {}
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                taken = seconds_of(call)
                if repeat:  # the first round warms up
                    seconds.setdefault(name, []).append(taken)
        return seconds, [whole.stat().st_size, sum(path.stat().st_size for path in parts)]


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    add_text_arguments(parser, context=1792, target=128)
    parser.add_argument("--documents", type=int, default=4, help="that the context is cut into")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    windows = load_windows(arguments, AutoTokenizer.from_pretrained(arguments.checkpoint))
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=arguments.dtype).eval()
    context, documents = arguments.context, arguments.documents
    lines = [f"# Prefixes of `{Path(arguments.checkpoint).name}`", ""]
    lines.append(f"{documents} documents in {context} tokens of context, {arguments.target} scored tokens behind them.")
    for text, rows in windows.items():
        lines += ["", f"## {text}, {len(rows)} windows", ""]
        lines += loss_table(measure_loss(model, rows, context, arguments.target, documents))
    seconds, sizes = measure_time(model, next(iter(windows.values()))[0, :context], documents, arguments.repeats)
    lines += ["", f"## To the first token, median of {arguments.repeats}, ms", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {1000 * statistics.median(taken):,.0f} |" for name, taken in seconds.items()]
    lines += ["", f"Files: {sizes[0]:,} bytes with keys; {sizes[1]:,} as slots, {documents} documents."]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
