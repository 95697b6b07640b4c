#!/usr/bin/env python
"""Compression in several languages: ratio, cost, protection, and whether a question finds what it asks for.

    apt-get install debian-reference-en debian-reference-de debian-reference-zh-cn    # one book in three languages
    for l in en de zh-cn; do zcat /usr/share/debian-reference/debian-reference.$l.txt.gz > $l.txt; done
    python scripts/measure_languages.py --checkpoint FOLDER --text-file en.txt de.txt zh-cn.txt --output languages.md

A book's numbered sections in a row are one prompt, without their headings; the heading of one of them, in the middle,
is the question. No layer of the model runs.

- characters per token, per slot: of the prompt.
- protected: tokens that never merge by themselves, such as special ones; each must have a slot of its own.
- stage: milliseconds for 1,000 tokens, encoder included.
- kept: tokens with a slot of their own, of the section that the question names and of the others.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.span_planner import always_protected

HEADING = re.compile(r"^\d+(?:\.\d+)+\.\s(.+)$", re.MULTILINE)
# Between characters of which a line break is no space.
WIDE = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]"
SHORTEST_SECTION = 200  # characters


def read_sections(path: Path) -> list[tuple[str, str]]:
    """(heading, text) of a book's numbered sections; lines of a paragraph are joined."""
    parts = HEADING.split(path.read_text(encoding="utf-8"))[1:]
    sections = []
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        joined = "\n\n".join(re.sub(f"(?<={WIDE}) (?={WIDE})", "", paragraph) for paragraph in paragraphs).strip()
        if len(joined) >= SHORTEST_SECTION:
            sections.append((heading.strip(), joined))
    return sections


def make_prompts(sections: list[tuple[str, str]], tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    """Prompts of about `length` tokens: text, ids, the section of each token (-1: the question), which one is asked."""
    prompts: list[dict[str, Any]] = []
    group: list[tuple[str, list[int]]] = []
    for heading, text in sections:
        group.append((heading, tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]))
        if sum(len(ids) for _, ids in group) < length or len(group) < 3:
            continue
        asked = len(group) // 2
        question = tokenizer(group[asked][0], add_special_tokens=False)["input_ids"]
        ids = [i for _, part in group for i in part] + question
        section = [number for number, (_, part) in enumerate(group) for _ in part] + [-1] * len(question)
        prompts.append({"ids": torch.tensor([ids]), "section": torch.tensor(section), "asked": asked})
        group = []
    return prompts[:count]


@torch.no_grad()
def measure(model: Any, tokenizer: Any, prompt: dict[str, Any], ratio: float) -> dict[str, float]:
    """The figures of one prompt."""
    ids, section = prompt["ids"], prompt["section"]
    begin = time.perf_counter()
    compressed = model.compress(ids, query_mask=(section < 0)[None].long(), target_ratio=ratio)
    seconds, tokens = time.perf_counter() - begin, ids.shape[1]
    sizes = torch.bincount(compressed.span_ids[0])
    alone = (sizes == 1)[compressed.span_ids[0]]
    protected = torch.isin(ids[0], torch.tensor(always_protected(model.config)))
    if not bool(alone[protected].all()):
        raise RuntimeError("a protected token has merged")
    # The latest tokens stay in any case.
    free = (section >= 0) & (torch.arange(tokens) < tokens - int((section < 0).sum()) - model.config.recent_window)
    characters = len(tokenizer.decode(ids[0]))
    return {
        "characters per token": characters / tokens,
        "characters per slot": characters / len(sizes),
        "tokens per slot": tokens / len(sizes),
        "protected": 100 * float(protected.float().mean()),
        "stage": 1e6 * seconds / tokens,
        "kept, named": 100 * float(alone[free & (section == prompt["asked"])].float().mean()),
        "kept, others": 100 * float(alone[free & (section != prompt["asked"])].float().mean()),
    }


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+")
    parser.add_argument("--text-file", type=Path, nargs="+", required=True, help="a book in a language each")
    parser.add_argument("--length", type=int, default=1500, help="tokens of a prompt, about")
    parser.add_argument("--prompts", type=int, default=30, help="of each text, at most")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.4, 4.0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    lines = ["# Languages", "", "| model | text | prompts | ratio | characters per token, per slot | tokens per slot "]
    lines[-1] += "| protected | stage, ms | kept: named section | other sections |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for checkpoint in arguments.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        logging.set_verbosity_error()  # the layers that stay unread are no news
        model = AutoModel.from_pretrained(checkpoint, num_hidden_layers=0).eval()
        for path in arguments.text_file:
            prompts = make_prompts(read_sections(path), tokenizer, arguments.length, arguments.prompts)
            for ratio in arguments.ratios:
                rows = [measure(model, tokenizer, prompt, ratio) for prompt in prompts]
                mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
                stage = statistics.median(row["stage"] for row in rows)
                lines.append(
                    f"| {Path(checkpoint).name} | {path.stem} | {len(rows)} | {ratio:g} "
                    f"| {mean['characters per token']:.2f}, {mean['characters per slot']:.1f} "
                    f"| {mean['tokens per slot']:.2f} | {mean['protected']:.1f} % | {stage:.0f} "
                    f"| {mean['kept, named']:.0f} % | {mean['kept, others']:.0f} % |"
                )
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
