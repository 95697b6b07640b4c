"""NAME=VALUE in its three kinds."""

import pytest

from semtoken_hf.evaluation.named_values import read_fields, read_numbers, read_pairs


def test_fields_are_json_where_they_can_be():
    given = ["position_mode=compact", "max_span_length=4", "target_ratio=2.5", "max_slots=null", "a=b=c", "d="]
    assert read_fields(given, "set") == {
        "position_mode": "compact",
        "max_span_length": 4,
        "target_ratio": 2.5,
        "max_slots": None,
        "a": "b=c",
        "d": "",
    }


def test_numbers():
    assert read_numbers(["a.txt=2", "b=0.5"], "weights") == {"a.txt": 2.0, "b": 0.5}


@pytest.mark.parametrize("read", [read_pairs, read_numbers])
def test_what_has_no_name_or_value(read):
    with pytest.raises(ValueError, match=r"--x takes NAME=VALUE, got \[") as error:
        read(["a=1", "=value"], "x")
    assert "'=value'" in str(error.value)


@pytest.mark.parametrize("wrong", ["much", "-1", "nan"])
def test_what_is_no_number(wrong):
    with pytest.raises(ValueError, match="--x takes NAME=NUMBER, 0 or more"):
        read_numbers([f"a={wrong}"], "x")
