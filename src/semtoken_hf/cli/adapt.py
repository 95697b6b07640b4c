"""`semtoken adapt`: teach a converted checkpoint to read merged slots, by distillation."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn

import typer

from ..evaluation.option_names import DataclassParser
from ..training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments
from .dataclass_options import build, takes_fields
from .main import CONTEXT
from .options import Json, Quiet, SpreadingCommand
from .output import USAGE, bars, console, ending_well, fail, only_json

RESUMING = "start the same command again to go on from the last saved step"
PANELS = {
    "Text": ("text_config", "text_split", "text_column", "text_documents", "weights", "held_out_share"),
    "Packed rows": ("objective", "sequence_length", "chunk_length", "span_lengths", "instructions"),
    "Contexts": ("context_length", "min_context_length", "target_length", "ratios", "uncompressed_share"),
    "Training": (
        *("lora_rank", "lora_alpha", "merger_learning_rate", "merger_only_share"),
        *("cross_entropy_weight", "model_dtype", "evaluation_windows", "count_flops"),
    ),
    "Auxiliary tasks": ("tasks", "task_weight", "task_rate", "task_power", "switch_at"),
}

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


class TrainingParser(DataclassParser):
    """The options of `TrainingArguments`; a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (semtoken adapt --help-training lists the options of the training)", USAGE)


def training_parser() -> TrainingParser:
    return TrainingParser(
        AdaptationTrainingArguments,  # type: ignore[arg-type]
        prog="semtoken adapt",
        usage="semtoken adapt [OPTIONS] [OPTIONS OF THE TRAINING]",
        add_help=False,
        allow_abbrev=False,
    )


def _show_training_help(wanted: bool) -> None:
    if wanted:
        training_parser().print_help()
        raise typer.Exit


@app.command(
    cls=SpreadingCommand, context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True}
)
@takes_fields(AdaptationArguments, PANELS)
def adapt(
    context: typer.Context,
    help_training: Annotated[
        bool,
        typer.Option(
            "--help-training", is_eager=True, callback=_show_training_help, help="list the options of the training"
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Teach a converted checkpoint to predict from a merged context what it predicts from the whole one.

    Every option of `transformers.TrainingArguments` is taken, too: `--max-steps`, `--learning-rate`, ...
    (`--help-training` lists them). The adapted checkpoint is `OUTPUT_DIR/model`, with `curve.csv` and `curve.png`
    beside it. A killed run goes on where it was when it is started again.

    **Examples**

        semtoken adapt --checkpoint my-semtoken --text corpus --output-dir runs/adapt
        semtoken adapt --checkpoint my-semtoken --text corpus --trainable full --max-steps 1000 --output-dir runs/full
        accelerate launch -m semtoken_hf adapt --checkpoint my-semtoken --text corpus --output-dir runs/adapt

    **Exit codes**: 0 adapted; 1 the text or the checkpoint does not do; 2 wrong usage; 130 Ctrl-C.
    """
    from ..training.adaptation import adapt
    from ..training.adaptation_curve import read_curve

    with ending_well(RESUMING), only_json(as_json) as answer, bars(quiet):
        arguments = build(AdaptationArguments, given)
        training = read_training_options(context.args)
        folder = adapt(arguments, training)
        if training.process_index != 0:
            return
        curve = read_curve(folder.parent) if (folder.parent / "curve.csv").exists() else []
        answer({"folder": folder, "output_dir": folder.parent, "trainable": arguments.trainable, "curve": curve})
        if not as_json:
            console().print(str(folder), style="bold")


def read_training_options(args: list[str]) -> AdaptationTrainingArguments:
    """The options of the training; what it refuses is wrong usage.

    Raises:
        SystemExit: with 2.
    """
    parser = training_parser()
    try:
        training, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    except ValueError as error:
        fail(str(error), USAGE)
    if unknown:
        parser.error(f"there is no option {unknown[0]}")
    return training
