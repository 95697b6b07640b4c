"""`semtoken generate`: read a prompt and write on, as it comes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from transformers import TextStreamer, set_seed

from .main import CONTEXT
from .options import Fields, Json, Quiet, SpreadingCommand, fields_of
from .output import USAGE, bars, console, ending_well, fail, only_json
from .reading import Reading, encode, load, read_on
from .texts import size_text

PROMPT, COMPRESSION, SAMPLING, LOADING = "Prompt", "Compression", "Sampling", "Loading"

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT)
def generate(
    checkpoint: Annotated[str, typer.Argument(help="SemToken folder or Hub id")],
    prompt: Annotated[str | None, typer.Argument(help="the text; or --file, or standard input")] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", rich_help_panel=PROMPT, metavar="FILE", help="with the prompt; -: standard input"),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question", rich_help_panel=PROMPT, help="put behind the prompt; stays whole and steers what else does"
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", rich_help_panel=PROMPT, help="as a user's turn, in the tokenizer's chat template")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, rich_help_panel=SAMPLING, help="tokens to write at most")
    ] = 256,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            "--target-ratio", min=1, rich_help_panel=COMPRESSION, help="tokens per slot; the checkpoint's if unset"
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", rich_help_panel=COMPRESSION, help="no compression: exactly the plain model")
    ] = False,
    fields: Fields = None,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", rich_help_panel=SAMPLING, help="as the checkpoint says if unset"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", rich_help_panel=SAMPLING, help="implies --do-sample")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", rich_help_panel=SAMPLING, help="implies --do-sample")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", rich_help_panel=SAMPLING, help="of the sampling")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", rich_help_panel=LOADING, help="of the weights"),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            "--device", rich_help_panel=LOADING, help="cpu, cuda, auto, ...; a GPU where there is one if unset"
        ),
    ] = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option("--attn-implementation", rich_help_panel=LOADING, help="eager, sdpa, flash_attention_2, ..."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", rich_help_panel=LOADING, help="run the checkpoint's own modules"),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a prompt and write on, as it comes; then, on standard error, how it was read.

    The last line says tokens and slots of the prompt, bytes of its KV cache, and the seconds of reading it and of each
    token.

    **Examples**

        semtoken generate my-semtoken "Once upon a time" --max-new-tokens 40
        semtoken generate my-semtoken --file report.txt --question "What did they decide?" --target-ratio 4
        semtoken generate my-semtoken --chat --file - --json < transcript.txt
        semtoken generate my-semtoken --file report.txt --plain

    **Exit codes**: 0 written; 1 the checkpoint or the text cannot be read; 2 wrong usage; 130 Ctrl-C.
    """
    with ending_well("nothing was saved"), only_json(as_json) as answer, bars(quiet):
        given = fields_of(fields)
        if plain and target_ratio is not None:
            fail("--plain and --target-ratio exclude each other", USAGE)
        text = read_prompt(prompt, file)
        sampling: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        if do_sample is None and (temperature is not None or top_p is not None):
            sampling["do_sample"] = True
        options = {name: value for name, value in sampling.items() if value is not None}
        # A plain call must not even ask for another ratio.
        options |= {"compression": False} if plain else {"target_ratio": target_ratio}
        loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        model, tokenizer = load(checkpoint, given, trust_remote_code, device, **loading)
        inputs = encode(tokenizer, text, question, chat)
        if seed is not None:
            set_seed(seed)
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with waiting(inputs["input_ids"].shape[1], quiet) as stop_waiting:
            reading, ids = read_on(
                model, inputs, stop_waiting, streamer=streamer, max_new_tokens=max_new_tokens, **options
            )
        reading.text = tokenizer.decode(ids, skip_special_tokens=True)
        answer(record_of(reading))
        if not as_json:
            sys.stdout.flush()
            console(stderr=True).print(summary(reading, plain, model.config), style="dim")


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The text from where it is said to be.

    Raises:
        SystemExit: with 2, if it is given twice or not at all.
        ValueError: it is empty, or no text.
    """
    if (prompt is None) == (file is None) and (prompt is not None or sys.stdin.isatty()):
        fail("give the prompt once: as an argument, with --file, or on standard input", USAGE)
    if prompt is None:
        try:
            if file is None or file == "-":
                prompt = sys.stdin.read()
            else:
                with open(file, encoding="utf-8") as handle:
                    prompt = handle.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file or 'standard input'} is not UTF-8 text: {error}") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


@contextlib.contextmanager
def waiting(tokens: int, quiet: bool) -> Iterator[Any]:
    """A sign of life on a terminal while the prompt is read; yields what ends it."""
    show: Console = console(stderr=True)
    if quiet or not show.is_terminal:
        yield lambda: None
        return
    status = show.status(f"reading {tokens:,} tokens")
    status.start()
    try:
        yield status.stop
    finally:
        status.stop()


def record_of(reading: Reading) -> dict[str, Any]:
    """A reading for machines."""
    return {
        "text": reading.text,
        "tokens": reading.tokens,
        "slots": reading.slots,
        "ratio": reading.ratio,
        "kv_bytes": reading.kv_bytes,
        "budget": reading.budget,
        "budget_met": reading.budget_met,
        "new_tokens": reading.new_tokens,
        "seconds": {
            "prefill": reading.prefill_seconds,
            "per_token": reading.seconds_per_token,
            "total": reading.prefill_seconds + reading.decode_seconds,
        },
    }


def summary(reading: Reading, plain: bool, config: Any) -> str:
    """A reading in one line."""
    parts = [f"{reading.tokens:,} tokens -> {reading.slots:,} slots ({reading.ratio:.2f} tokens per slot)"]
    if reading.budget is None and not plain and config.compression and reading.tokens < config.min_prompt_length:
        parts.append(f"read plain: shorter than min_prompt_length ({config.min_prompt_length})")
    if reading.budget_met is False:
        parts.append(
            f"the budget of {reading.budget:,} slots was not met: protected tokens and max_span_length forbid it"
        )
    parts.append(f"KV cache {size_text(reading.kv_bytes)}")
    parts.append(f"prefill {reading.prefill_seconds:.2f} s")
    if reading.seconds_per_token is not None:
        parts.append(f"{1e3 * reading.seconds_per_token:.1f} ms per token")
    return ", ".join(parts)
