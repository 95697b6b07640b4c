"""The command `semtoken`: one word for each thing to do with a checkpoint."""

from __future__ import annotations

import sys

COMMANDS = {
    "evaluate": "quality, memory and time of a checkpoint beside its baselines, as a report",
    "lm-eval": "any task of lm-eval, with compressed contexts (--model semtoken)",
}


def main(arguments: list[str] | None = None) -> None:
    """Run `semtoken COMMAND OPTIONS`.

    Raises:
        SystemExit: with a message where the command is unknown or its options make no sense.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name == "evaluate":
        from .evaluation.evaluate import main as evaluate

        return evaluate(rest)
    if name == "lm-eval":
        from .evaluation.lm_eval_model import main as lm_eval

        return lm_eval(rest)
    lines = [f"  {command:<10}{text}" for command, text in COMMANDS.items()]
    usage = "\n".join(["usage: semtoken COMMAND OPTIONS", "", *lines, "", "semtoken COMMAND --help lists the options."])
    if name in ("-h", "--help"):
        print(usage)
        return None
    sys.exit(f"error: there is no command {name!r}\n{usage}")
