"""`target_ratio` and `compression` in a generation configuration: all that a client of a server can set."""

import pytest
import torch
from transformers import GenerationConfig

from tests.fixtures.tiny import plain_twin, random_ids, tiny_model

NEW = 6


def slots(model, ids, **arguments):
    """Slots of the prompt in the cache of `generate`, and the tokens."""
    outputs = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **arguments)
    return int(outputs.past_key_values.compressed_lengths) - (NEW - 1), outputs.sequences


def test_a_generation_config_sets_the_ratio():
    model, ids = tiny_model(), random_ids(1, 96)
    kept, tokens = slots(model, ids, generation_config=GenerationConfig(target_ratio=4.0, max_new_tokens=NEW))
    assert kept == 24
    expected, expected_tokens = slots(model, ids, target_ratio=4.0)
    assert expected == 24
    assert torch.equal(tokens, expected_tokens)


def test_a_generation_config_switches_compression_off():
    model, ids = tiny_model(), random_ids(1, 96)
    tokens = model.generate(ids, generation_config=GenerationConfig(compression=False, max_new_tokens=NEW))
    assert torch.equal(tokens, plain_twin(model).generate(ids, max_new_tokens=NEW))
    assert not torch.equal(tokens, model.generate(ids, max_new_tokens=NEW))


def test_the_nearer_one_wins():
    """Call before given configuration before the model's own before `config.json`."""
    model, ids = tiny_model(), random_ids(1, 96)
    assert slots(model, ids)[0] == 40
    model.generation_config.target_ratio = 4.0
    given = GenerationConfig(target_ratio=3.0, max_new_tokens=NEW)
    assert slots(model, ids)[0] == 24
    assert slots(model, ids, generation_config=given)[0] == 32
    assert slots(model, ids, target_ratio=2.0)[0] == 48
    assert slots(model, ids, generation_config=given, target_ratio=2.0)[0] == 48


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"target_ratio": 0.5}, "`target_ratio` must be a finite number >= 1"),
        ({"target_ratio": "4"}, "`target_ratio` must be a finite number >= 1"),
        ({"compression": "false"}, "`compression` must be True or False"),
    ],
)
def test_nonsense_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(random_ids(1, 96), generation_config=GenerationConfig(**field, max_new_tokens=NEW))
