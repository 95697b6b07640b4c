#!/usr/bin/env python
"""A plain checkpoint and an encoder become one folder: `semtoken convert` without installing the command."""

import sys

from semtoken_hf.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
