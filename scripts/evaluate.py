#!/usr/bin/env python
"""`semtoken evaluate` without installing the command: see `semtoken_hf.evaluation.evaluate`."""

from semtoken_hf.evaluation.evaluate import main

if __name__ == "__main__":
    main()
