"""A tiny checkpoint and text, and one whole benchmark of them."""

import json

import pytest

from semtoken_hf.benchmarking.benchmark import benchmark
from semtoken_hf.benchmarking.configuration import BenchmarkConfig
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

LENGTHS = [256, 512]
RATIO = 2.0


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Arguments that name the checkpoint and the text."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_model(merge_mode="learned", merger_rank=8, adapted_for={"position_mode": "compact"}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(PROSE)
    return {"checkpoint": str(folder), "text_file": str(folder / "text.txt")}


@pytest.fixture(scope="session")
def config_of(sources):
    def make(folder, **fields):
        small = {"shapes": ["tiny"], "lengths": LENGTHS, "ratios": [RATIO], "batches": ["1", "skewed"]}
        small |= {"new_tokens": 4, "repetitions": 2, "max_seconds": 30.0, "stage_lengths": LENGTHS}
        return BenchmarkConfig(output_dir=str(folder), **{**small, **sources, **fields})

    return make


@pytest.fixture(scope="session")
def measured(config_of, tmp_path_factory):
    """Folder of a whole benchmark, and its JSON."""
    folder = benchmark(config_of(tmp_path_factory.mktemp("benchmark")))
    return folder, json.loads((folder / "benchmark.json").read_text())
