"""`forward`, `generate` and the base model use what `compress` returns."""

import pytest
import torch

from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model


@pytest.fixture(scope="module", params=["boundary", "greedy", "sentence", "uniform"])
def model(request):
    return tiny_model(segmentation_mode=request.param)


@pytest.fixture
def ragged():
    return ragged_prompts((96, 70, 41, 18, 9))


def test_what_forward_and_generate_use(model, ragged):
    ids, mask = ragged
    protected = torch.zeros_like(ids)
    protected[:, 60:64] = 1
    arguments = {"attention_mask": mask, "protected_mask": protected, "target_ratio": 3.0}
    prompt = model.compress(ids, **arguments)
    with torch.no_grad():
        outputs = model(ids, **arguments, logits_to_keep=1)
    generated = model.generate(ids, **arguments, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    width = prompt.inputs_embeds.shape[1]
    assert torch.equal(outputs.span_ids, prompt.span_ids)
    assert torch.equal(outputs.compressed_lengths, prompt.kept_lengths)
    assert torch.equal(outputs.past_key_values.slot_lengths, prompt.slot_lengths)
    assert torch.equal(generated.past_key_values.slot_lengths[:, :width], prompt.slot_lengths)
    planned = model.generate(ids, attention_mask=mask, span_ids=prompt.span_ids, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(planned, generated.sequences)


@pytest.mark.parametrize(
    ("fields", "arguments", "length"),
    [
        ({"compression": False}, {"compression": True}, 40),
        ({"target_ratio": 1}, {"target_ratio": 2.0}, 48),
        ({"target_ratio": 4.0}, {}, 24),
        ({"target_ratio": 1, "max_slots": 30}, {}, 30),
        ({"target_ratio": 1.5, "max_slots": 60}, {"target_ratio": 2.4}, 40),
    ],
)
def test_arguments_win_over_the_configuration(fields, arguments, length):
    model, ids = tiny_model(**fields), random_ids(1, 96)
    assert model(ids, logits_to_keep=1, **arguments).compressed_lengths.tolist() == [length]
    outputs = model.generate(ids, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True, **arguments)
    assert outputs.past_key_values.compressed_lengths.tolist() == [length + 1]


def test_base_model(model, ragged):
    ids, mask = ragged
    prompt = model.compress(ids, mask)
    with torch.no_grad():
        outputs = model.model(ids, attention_mask=mask, compression=True)
        states, *rest = model.model(ids, attention_mask=mask, compression=True, return_dict=False)
    assert outputs.last_hidden_state.shape == prompt.inputs_embeds.shape
    assert torch.equal(outputs.span_ids, prompt.span_ids)
    assert torch.equal(outputs.compressed_lengths, prompt.kept_lengths)
    assert torch.equal(states, outputs.last_hidden_state)
    assert len(rest) == 1  # the cache, as of the plain model
    assert torch.equal(model.model.compress(ids, mask).inputs_embeds, prompt.inputs_embeds)
