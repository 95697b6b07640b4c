#!/usr/bin/env python
"""Quality, memory and time of a checkpoint beside its baselines: `semtoken evaluate` without installing the command."""

import sys

from semtoken_hf.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
