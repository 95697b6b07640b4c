"""`semtoken inspect`: see what a checkpoint merges in a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from ..evaluation.files import write_text
from ..inspection.page import prompt_page, token_pieces
from ..inspection.planning import default_ratios, plan_ratios
from ..inspection.summary import notes_on, summarise
from ..inspection.terminal import show_plans
from ..tokenization_semtoken_fast import SpanPlanner
from .generate import read_prompt
from .main import CONTEXT
from .options import NUMBER, Fields, Json, Quiet, SpreadingCommand, fields_of
from .output import USAGE, bars, console, ending_well, fail, only_json
from .reading import encode, load_tokenizer

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT)
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="SemToken folder or Hub id")],
    text_file: Annotated[str | None, typer.Argument(help="the text, UTF-8; -: standard input")] = None,
    text: Annotated[str | None, typer.Option("--text", help="the text itself")] = None,
    question: Annotated[
        str | None, typer.Option("--question", help="put behind the text; stays whole and steers what else does")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="as a user's turn, in the tokenizer's chat template")] = False,
    target_ratio: Annotated[
        list[float] | None,
        typer.Option(
            "--target-ratio",
            min=1,
            metavar=NUMBER,
            help="tokens per slot, many; the first one is shown. Unset: the checkpoint's, beside 1.5 to 8",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE.html", help="also write a page that needs nothing else")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="of the text shown in the terminal; 0: figures alone")
    ] = 400,
    fields: Fields = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="allow a tokenizer that brings its own code")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See what a checkpoint merges in a text: which tokens share a slot, which stay whole, and why.

    Reads the tokenizer, the configuration and the encoder; the language model's weights stay where they are. In the
    terminal, `[...]` is a slot of several tokens and `{...}` is protected.

    **Examples**

        semtoken inspect my-semtoken chapter.txt
        semtoken inspect my-semtoken chapter.txt --target-ratio 2.4 4 8 --html chapter.html
        semtoken inspect my-semtoken report.txt --question "What did they decide?" --set query_weight=2
        semtoken inspect my-semtoken - --chat --json < transcript.txt

    **Exit codes**: 0 shown; 1 the checkpoint or the text cannot be read; 2 wrong usage; 130 Ctrl-C.
    """
    with ending_well("no page was written"), only_json(as_json) as answer, bars(quiet):
        given = fields_of(fields)
        if (text is None) == (text_file is None):
            fail("give the text once: as a file, as - for standard input, or with --text", USAGE)
        logging.set_verbosity_error()
        planner = SpanPlanner.from_pretrained(checkpoint, given)
        tokenizer = load_tokenizer(checkpoint, trust_remote_code)
        inputs = encode(tokenizer, read_prompt(text, text_file), question, chat)
        ratios = sorted(set(target_ratio)) if target_ratio else default_ratios(planner.config)
        shown = ratios.index(target_ratio[0] if target_ratio else planner.config.target_ratio)
        plans = plan_ratios(planner, inputs, ratios)
        notes = notes_on(plans, planner.config, question is not None)
        if html is not None:
            name = Path(text_file).name if text_file not in (None, "-") else "a text"
            write_text(html, prompt_page(plans, tokenizer, title=f"What SemToken merges in {name}", shown=shown))
        record = {"checkpoint": checkpoint, "plans": [asdict(summarise(plan)) for plan in plans]}
        answer({**record, "notes": notes, "html": None if html is None else str(html)})
        if not as_json:
            pieces = token_pieces(tokenizer, inputs["input_ids"][0].tolist())
            show_plans(console(), plans, pieces, shown, max_tokens, notes)
            if html is not None:
                console(stderr=True).print(f"the page: {html}")
