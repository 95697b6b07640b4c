"""One command that measures and checks everything that needs a GPU (`scripts/gpu_suite.py`); developer only."""
