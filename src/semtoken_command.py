"""The command `semtoken` until its package is imported, which takes seconds: Ctrl-C ends with one line even then."""

import sys


def main() -> None:
    """See `semtoken_hf.cli.main`."""
    try:
        from semtoken_hf.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted; nothing was begun", file=sys.stderr)
        sys.exit(130)
    run()
