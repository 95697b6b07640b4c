#!/usr/bin/env python
"""Ask three questions about a chapter, whole and compressed, through `pipeline("text-generation")`, side by side.

bash scripts/quickstart.sh                      # sets up an environment and a real model, then runs this
python scripts/quickstart.py --checkpoint my-semtoken --text-file my_document.txt --question "Who signed it?"
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline, set_seed
from transformers.utils import logging

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import markdown_provenance
from semtoken_hf.evaluation.side_by_side import Prompt, Reading, read_side_by_side, side_by_side_table

ROOT = Path(__file__).resolve().parent.parent
# Their answers stand near the beginning, in the middle and at the end of the chapter. SmolLM2 answers all three right
# when it reads everything; as it does with seven of the 22 that were tried.
QUESTIONS = (
    "Where does Sherwood want to travel?",
    "What musical instrument does Applegarth play?",
    "Who entered the room at the end?",
)


def prompt_of(text: str, question: str, is_chat: bool) -> Prompt:
    """A text and a question about it, as a chat or, for a model without a chat template, as a text to go on with."""
    if not is_chat:
        return f"{text}\n\nQuestion: {question}\nAnswer:"
    return [{"role": "user", "content": f"{text}\n\n{question} Answer in one short sentence."}]


def show(questions: list[str], readings: dict[str, Reading]) -> None:
    """Every question with both answers below each other, then the table."""
    for number, question in enumerate(questions):
        print(f"\n{question}")
        for name, reading in readings.items():
            answer = " ".join(reading.answers[number].split())
            print(textwrap.fill(answer, 100, initial_indent=f"  {name + ':':10}", subsequent_indent=" " * 12))
    print(f"\n{side_by_side_table(readings)}\n")


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="scripts/reference_model.sh makes and names one")
    parser.add_argument("--text-file", type=Path, default=ROOT / "scripts" / "quickstart_chapter.txt")
    parser.add_argument("--question", nargs="+", default=list(QUESTIONS))
    parser.add_argument("--target-ratio", type=float, help="tokens per slot (default: the checkpoint's)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()

    set_seed(0)
    logging.set_verbosity_error()
    device = 0 if torch.cuda.is_available() else -1
    pipe: Any = pipeline("text-generation", model=arguments.checkpoint, dtype=torch.float32, device=device)
    text = arguments.text_file.read_text(encoding="utf-8").strip()
    prompts = [prompt_of(text, q, pipe.tokenizer.chat_template is not None) for q in arguments.question]
    print(f"{Path(arguments.checkpoint).name} reads {arguments.text_file.name} and answers, greedily", flush=True)
    readings = read_side_by_side(pipe, prompts, arguments.max_new_tokens, arguments.repetitions, arguments.target_ratio)
    show(arguments.question, readings)
    print(f"Medians of {arguments.repetitions} alternating repetitions of each question.\n")
    print(markdown_provenance())


if __name__ == "__main__":
    main()
