"""What the commands share: options that several have, and a parser for lists written `--ratios 2.4 4`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..evaluation.named_values import is_number, read_fields
from ..evaluation.option_names import dashed
from .output import USAGE, fail

Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, everything else on stderr")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="compression fields of the configuration, such as target_ratio=4; many"
    ),
]
# Metavar of lists that take numbers alone.
NUMBER = "NUMBER"
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def fields_of(values: list[str] | None) -> dict[str, Any]:
    """The fields of `--set`; anything that does not read FIELD=VALUE is wrong usage.

    Raises:
        SystemExit: with 2.
    """
    try:
        return read_fields(values or [], "set")
    except ValueError as error:
        fail(str(error), USAGE)


class SpreadingCommand(TyperCommand):
    """Lists may be written `--ratios 2.4 4`, as argparse has them, beside `--ratios 2.4 --ratios 4`.

    A list of numbers takes what reads as a number, one of NAME=VALUE what has a `=`, any other all up to the next
    option. In a command without arguments, a flag may be followed by true or false.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spread(args, self.params)))


def _spread(args: list[str], params: list[Any]) -> Iterator[str]:
    """The same arguments with every list as a repeated option, and every flag without a value."""
    named = {name: p for p in params for name in p.opts}
    flags_have_values = all(p.param_type_name == "option" for p in params)
    current, is_first, rest = None, False, list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            yield from [arg, *rest]
            return
        option = named.get(dashed(arg)) if arg.startswith("--") else None
        if option is not None:
            current, is_first = None, False
            if getattr(option, "multiple", False):
                current, is_first = option, True
            elif flags_have_values and getattr(option, "is_flag", False) and rest and rest[0].lower() in TRUE + FALSE:
                arg = arg if rest.pop(0).lower() in TRUE else next(iter(option.secondary_opts), "")
            if arg:
                yield arg
        elif current is not None and (is_first or _belongs(arg, current.metavar or "")):
            yield from [arg] if is_first else [current.opts[0], arg]
            is_first = False
        else:
            current = None
            yield arg


def _belongs(arg: str, metavar: str) -> bool:
    """Whether an argument behind the first value of a list is another one."""
    if is_number(arg):
        return True
    if metavar == NUMBER or arg.startswith("-"):
        return False
    return "=" in arg if "=" in metavar else True
