"""`semtoken lm-eval`: lm-eval's own command line, to which `--model semtoken` is known."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from .output import ending_well

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


class PassingOn(TyperCommand):
    """Reads none of its arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        super().parse_args(ctx, [])
        ctx.args = list(args)
        return ctx.args


@app.command("lm-eval", cls=PassingOn, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    """Any task of lm-eval with compressed contexts; without arguments, or with `--help`, explains itself.

    **Examples**

        semtoken lm-eval --model semtoken --model_args pretrained=my-semtoken,target_ratio=2.4 --tasks lambada_openai
        semtoken lm-eval run --help
    """
    with ending_well():
        from ..evaluation.lm_eval_model import main

        main(context.args)
