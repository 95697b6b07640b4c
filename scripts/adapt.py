#!/usr/bin/env python
"""Adapt a converted checkpoint to its merged slots: `semtoken adapt` without installing the command."""

import sys

from semtoken_hf.cli.main import main

if __name__ == "__main__":
    main(["adapt", *sys.argv[1:]])
