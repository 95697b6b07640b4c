"""The command line of the suite."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..benchmarking.shapes import SHAPES, dtype_of
from ..evaluation.option_names import DashedParser
from ..evaluation.provenance import provenance
from .parts import Context
from .report import Report
from .suite import BROKEN_DEVICE, PARTS, run_parts, supervise, worker_command

NO_GPU = (
    "No CUDA device: the GPU suite measures a GPU. To try its parts on the processor: "
    "python scripts/gpu_suite.py --device cpu --shapes tiny --lengths 512 1024 --long-length 4096"
)
# The report's own time, and that of the process to end.
MARGIN = 10.0
DTYPES = ("bfloat16", "float16", "float32")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = DashedParser(description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_suite.json"), help="JSON; Markdown beside it")
    parser.add_argument("--max-minutes", type=float, default=9.0, help="of everything together")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="in order of worth")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="smallest first; the last one reads the most")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2**i for i in range(10, 18)], help="prompt tokens")
    parser.add_argument("--long-length", type=int, default=2**20, help="tokens of the long prompt")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or ["160m", "1.1b", "llama-2-7b", "llama-3-8b"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every check held; 1: one did not, or a part failed; 2: there is no GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.worker:
        return run_worker(options)
    deadline = time.time() + 60 * options.max_minutes - MARGIN
    titles = {part.name: part.title for part in PARTS if part.name in options.parts}
    report = Report.start(options.output, titles)
    # Streams grow their caches by little: fragments would take the memory that they need.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    report = supervise([*worker_command(given), "--deadline", str(deadline)], report, deadline, environment)
    print(report.markdown())
    return 0 if report.passed else 1


def run_worker(options: argparse.Namespace) -> int:
    """What is still to do, in this process."""
    context = Context(
        device=torch.device(options.device),
        dtype=dtype_of(options.dtype),
        shapes=tuple(options.shapes),
        lengths=tuple(options.lengths),
        long_length=options.long_length,
        deadline=options.deadline,
    )
    report = Report.load(options.output)
    report.provenance |= {name: value for name, value in provenance().items() if name != "command"}
    with torch.no_grad():
        return 0 if run_parts(context, report, options.deadline) else BROKEN_DEVICE
