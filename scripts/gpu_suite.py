#!/usr/bin/env python
"""Everything that needs a GPU in one command of at most ten minutes: checks, tests, benchmark, one million tokens.

    python scripts/gpu_suite.py --output runs/gpu_suite.json

Writes JSON and Markdown after every step. Installs and downloads nothing; without flash-attn it uses what torch brings.
"""

import sys

from semtoken_hf.gpu_suite.command import main

if __name__ == "__main__":
    sys.exit(main())
