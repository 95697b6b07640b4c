#!/usr/bin/env python
"""Time and memory of SemToken beside plain Llama over n tokens and over m: see `semtoken_hf.benchmarking.benchmark`."""

from semtoken_hf.benchmarking.benchmark import main

if __name__ == "__main__":
    main()
