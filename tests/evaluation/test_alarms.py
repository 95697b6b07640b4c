import pytest

from semtoken_hf.evaluation.alarms import WORST_COST, WORST_ENCODER_SHARE, WORST_LOSS_OF_SCORE, find_alarms

WHERE = "Text, SemToken"


def cell_of(**fields):
    usual = {"task_title": "Text", "title": "SemToken", "ratio": 2.0, "method": "semtoken", "ablation": None}
    return {**usual, "is_perplexity": False, "metric": "F1", **fields}


@pytest.mark.parametrize(
    ("cell", "alarm"),
    [
        ({"is_perplexity": True, "cost": WORST_COST}, None),
        (
            {"is_perplexity": True, "cost": 0.0501},
            f"{WHERE}: perplexity +5.0 % at 2 tokens per slot (alarm above +5 %)",
        ),
        ({"score_lost": WORST_LOSS_OF_SCORE}, None),
        ({"score_lost": 2.04}, f"{WHERE}: points of F1 lost: 2.04 at 2 tokens per slot (alarm above 2)"),
        ({"score_lost": 9.0, "metric": "ROUGE-L"}, None),
        ({"score_lost": 9.0, "method": "truncation"}, None),
        ({"score_lost": 9.0, "ablation": "span"}, None),
    ],
)
def test_alarms_of_quality_are_semtoken_s_above_the_threshold(cell, alarm):
    assert find_alarms([cell_of(**cell)], []) == ([alarm] if alarm else [])


@pytest.mark.parametrize(("share", "alarms"), [(WORST_ENCODER_SHARE, 0), (0.301, 1)])
def test_the_encoder_may_take_its_share_of_the_latency(share, alarms):
    found = find_alarms([], [{"title": "SemToken", "length": 2048, "encoder_share": share}])
    assert len(found) == alarms
    assert all(
        line == "SemToken: the encoder's share of the latency: 30 % at 2,048 tokens (alarm above 30 %)"
        for line in found
    )


def test_ratios_of_one_method_share_a_line():
    cells = [
        cell_of(is_perplexity=True, cost=cost, ratio=ratio) for cost, ratio in ((0.06, 4.0), (0.01, 2.4), (0.1, 8.0))
    ]
    line = f"{WHERE}: perplexity +6.0 % at 4, +10.0 % at 8 tokens per slot (alarm above +5 %)"
    assert find_alarms(cells, []) == [line]
