import pytest
from semtoken_hf.command_line import COMMANDS, main

from semtoken_hf.evaluation.tasks import TASKS


def test_help_lists_the_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        shown = capsys.readouterr().out
        assert all(f"  {name:<10}{text}" in shown for name, text in COMMANDS.items())


def test_an_unknown_command_is_an_error_that_names_those_there_are():
    with pytest.raises(SystemExit, match="there is no command 'evaluat'") as stopped:
        main(["evaluat"])
    assert "evaluate" in str(stopped.value).split("usage")[1]


def test_evaluate_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: semtoken evaluate ")
    assert "    semtoken evaluate --checkpoint model_cards/semtoken-llama-tiny" in shown
    for name, task in TASKS.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {name} ")]
        assert (task.file or "(made here)") in line


def test_mistakes_of_evaluate_end_with_one_line():
    with pytest.raises(SystemExit, match=r"^error: --fraction must be in"):
        main(["evaluate", "--checkpoint", "nowhere", "--fraction", "2"])
    with pytest.raises(SystemExit, match=r"^error: --data_dir must be a folder, and there is none at nowhere"):
        main(["evaluate", "--checkpoint", "nowhere", "--data_dir", "nowhere"])
