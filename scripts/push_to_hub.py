#!/usr/bin/env python
"""Send a checkpoint to the Hub: `semtoken push` without installing the command."""

import sys

from semtoken_hf.cli.main import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
