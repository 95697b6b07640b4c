#!/usr/bin/env python
"""Time and memory of reading a prompt beside plain Llama: `semtoken benchmark` without installing the command."""

import sys

from semtoken_hf.cli.main import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
