"""Verdicts on figures that are made up."""

import pytest

from semtoken_hf.benchmarking.targets import MILLION, judge, verdict_table
from semtoken_hf.benchmarking.variants import PADDED, PLAIN_M, PLAIN_N, RAGGED


def variant(prefill, generate, slots=(1000,), kv_bytes=1000):
    return {"prefill": [prefill], "decode": [1.0], "generate": [generate], "slots": slots, "kv_bytes": kv_bytes}


def cell(length, shape="1.1b", batch="1", **variants):
    return {
        "shape": shape,
        "encoder": "static",
        "dtype": "bfloat16",
        "device": "cpu",
        "batch": batch,
        "length": length,
        "ratio": 2.4,
        "slot_bytes": 1,
        "stages": [{"encoder": 0.02, "layout": 0.005, "rest": 0.005}],
        "variants": {
            PLAIN_N: variant(3.0, 5.0),
            PLAIN_M: variant(0.9, 1.0),
            PADDED: variant(1.0, 1.04),
            **variants,
        },
    }


def stage(length, us=1.0, peak=100):
    seconds = us * 1e-6 * length
    fixed = {"shape": "tiny", "encoder": "static", "device": "cpu", "ratio": 2.4}
    return {
        **fixed,
        "length": length,
        "seconds": [seconds],
        "encoder_seconds": [seconds],
        "peak_bytes": peak * length,
    }


@pytest.fixture
def good():
    lengths = (2048, 4096, 8192, 16384)
    skewed = cell(4096, batch="skewed")
    skewed["variants"] |= {PADDED: variant(1.0, 9.0, (500, 100), 2000), RAGGED: variant(1.0, 1.0, (500, 100), 650)}
    cells = [*(cell(n) for n in lengths), cell(4096, shape="160m"), skewed]
    return {"cells": cells, "stage": [stage(8192), stage(MILLION)]}


def test_all_met(good):
    assert [v.is_met for v in judge(good)] == [True] * 8
    lines = verdict_table(good)
    assert "1.1b, static, batch 1, 4,096 tokens, cpu: 1.040 | met |" in lines[2]
    assert "8,192 tokens, cpu: 3.000; 1.1b, static, batch 1, 16,384 tokens, cpu: 3.000 | met |" in lines[3]
    assert "1.00 %" in lines[5]
    assert "2.00 %" in lines[8]
    assert "1.083" in lines[9]


SPOIL = {
    0: lambda f: f["cells"][1]["variants"].update({PADDED: variant(1.0, 1.06)}),
    4: lambda f: f["stage"].append(stage(MILLION, us=1.3)),
    7: lambda f: f["cells"][5]["variants"].update({RAGGED: variant(1.0, 1.0, (500, 100), 661)}),
}


@pytest.mark.parametrize("index", SPOIL)
def test_one_bad_cell_misses_one_target(good, index):
    SPOIL[index](good)
    assert [v.is_met for v in judge(good)] == [i != index for i in range(8)]
    assert verdict_table(good)[2 + index].endswith("**missed** |")
