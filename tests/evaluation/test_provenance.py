import pytest

from semtoken_hf.evaluation.provenance import command_line


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/home/me/scripts/quickstart.py", "--text-file", "/tmp/a b.txt"],
            "python scripts/quickstart.py --text-file 'a b.txt'",
        ),
        (["semtoken", "evaluate", "--checkpoints", "mini=/tmp/x/mini"], "semtoken evaluate --checkpoints mini=mini"),
        (["/usr/bin/semtoken", "evaluate", "--checkpoint", "model"], "semtoken evaluate --checkpoint model"),
        (["/lib/semtoken_hf/__main__.py", "benchmark"], "semtoken benchmark"),
    ],
)
def test_a_command_is_what_one_types(argv, command):
    assert command_line(argv) == command
