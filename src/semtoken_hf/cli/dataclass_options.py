"""The fields of a dataclass as the options of a command, so that none is written twice."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from ..evaluation.option_names import dashed
from .options import NUMBER
from .output import USAGE, fail

T = TypeVar("T")


def takes_fields(of: type, panels: dict[str, tuple[str, ...]] | None = None) -> Callable[[Callable], Callable]:
    """Decorate a command: every field of a dataclass is an option of it.

    The command takes what was given as `**given`, in place of which stand the options, and makes it an object with
    `build`. Help is each field's `metadata["help"]`, choices are `metadata["choices"]`.

    Args:
        of: the dataclass; types are str, int, float, bool, lists of them, and these or None.
        panels: fields of each panel of the help; the others are in the first one.
    """
    panel_of = {name: panel for panel, names in (panels or {}).items() for name in names}

    def decorate(command: Callable) -> Callable:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        hints = get_type_hints(of)
        options = [_parameter(field, hints[field.name], panel_of.get(field.name)) for field in fields(of) if field.init]
        command.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*options, *own]}
        return command

    return decorate


def build(of: type[T], given: dict[str, Any]) -> T:
    """The dataclass from the options that were given; what it refuses is wrong usage.

    Raises:
        SystemExit: with 2.
    """
    try:
        return of(**{field.name: given[field.name] for field in fields(of) if given.get(field.name) is not None})  # type: ignore[arg-type]
    except ValueError as error:
        fail(str(error), USAGE)


def _parameter(field: Field, hint: Any, panel: str | None) -> inspect.Parameter:
    """A field as a parameter of the function that Typer reads; not given, it is None, and the dataclass decides."""
    kind, is_list = _plain_type(hint)
    help_text, choices = field.metadata.get("help", ""), field.metadata.get("choices")
    if choices and not is_list:
        kind = Literal[tuple(choices)]
    name = dashed(field.name)
    names = f"--{name}" + (f"/--no-{name}" if kind is bool and field.default is not False else "")
    metavar = _metavar(kind, help_text) if is_list else None
    is_required = field.default is MISSING and field.default_factory is MISSING
    default = "" if is_required else _shown_default(field)
    annotation: Any = list[kind] if is_list else kind  # type: ignore[valid-type]
    option = typer.Option(names, help=help_text + default, rich_help_panel=panel, metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[annotation if is_required else annotation | None, option],
    )


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """Without None, and what lists hold; whether it is one."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _metavar(kind: Any, help_text: str) -> str:
    if kind in (int, float):
        return NUMBER
    first = help_text.replace(":", " ").split(" ")[0].rstrip(",")
    return first if "=" in first else "NAME"


def _shown_default(field: Field) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value is False or value == [] or value == "":
        return ""
    return f" (default {' '.join(map(str, value)) if isinstance(value, list) else value})"


__all__ = ["build", "takes_fields"]
