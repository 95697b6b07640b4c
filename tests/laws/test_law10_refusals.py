"""Law 10 for options and ids: what makes no sense is refused by name, or in the words of plain Llama."""

import pytest
import torch

from tests.fixtures.tiny import VOCAB_SIZE, plain_twin, random_ids, tiny_model

TOKENS = 48
IDS = random_ids(2, TOKENS)
COUNT = torch.arange(TOKENS).repeat(2, 1)
OPTIONS = {
    "compression text": ({"compression": "no"}, "`compression` must be True or False"),
    "compression number": ({"compression": 1}, "`compression` must be True or False"),
    **{
        f"chunks {value!r}": ({"prefill_chunk_size": value}, "`prefill_chunk_size` must be an integer >= 1")
        for value in (0, -1, 2.5, "3", True, -(2**70), 2**70)
    },
    **{
        f"logits {value!r}": ({"logits_to_keep": value}, "`logits_to_keep` must be")
        for value in (None, 1.5, "1", [1], torch.tensor([1.0]), torch.ones(2, TOKENS + 1, dtype=torch.bool))
    },
    "labels short": ({"labels": IDS[:, 1:], "logits_to_keep": 0}, "`labels` must have the shape"),
    "labels list": ({"labels": IDS.tolist(), "logits_to_keep": 0}, "`labels` must have the shape"),
}
WRONG_IDS = {
    "float": IDS.float(),
    "int8": IDS.to(torch.int8),
    "bool": IDS > 100,
    "3D": IDS[..., None],
    "1D": IDS[0],
    "list": IDS.tolist(),
    "no rows": IDS[:0],
    "beyond the vocabulary": IDS.where(COUNT != 20, VOCAB_SIZE),
    "negative": IDS.where(COUNT != 20, -1),
}


@pytest.fixture(scope="module")
def twins():
    model = tiny_model(attn_implementation="eager")
    return model, plain_twin(model)


@pytest.mark.parametrize("attention", ["eager", "semtoken_varlen"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_forward(attention, case):
    arguments, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        tiny_model(attn_implementation=attention)(IDS, **{"logits_to_keep": 1, **arguments})


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("value", [0, 2.5, 2**70])
def test_chunks_of_generate(value, compression):
    """Before an empty prompt or a split could fail over them."""
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be an integer >= 1"):
        tiny_model().generate(IDS[:, :0], prefill_chunk_size=value, compression=compression, max_new_tokens=1)


@pytest.mark.parametrize("merge_mode", ["mean", "representative"])
@pytest.mark.parametrize("segmentation_mode", ["boundary", "uniform"])
@pytest.mark.parametrize("case", WRONG_IDS)
def test_wrong_ids(case, segmentation_mode, merge_mode):
    """Also those that would merge away unseen."""
    model = tiny_model(segmentation_mode=segmentation_mode, merge_mode=merge_mode)
    with pytest.raises(ValueError, match="`input_ids` must be"):
        model.compress(WRONG_IDS[case])
    if case not in ("1D", "list", "no rows"):
        with pytest.raises(ValueError, match="`input_ids` must be"):
            model(WRONG_IDS[case], logits_to_keep=1)


def test_ids_that_a_mask_hides(twins):
    """Nobody looks them up."""
    hidden = torch.where(COUNT < 4, -7, IDS)
    prompts = [twins[0].compress(ids, (COUNT > 3).long()) for ids in (IDS, hidden)]
    assert torch.equal(prompts[0].span_ids, prompts[1].span_ids)
    assert torch.equal(prompts[0].inputs_embeds, prompts[1].inputs_embeds)


@pytest.mark.parametrize("mode", ["absolute", "", True, []])
def test_position_mode(twins, mode):
    with pytest.raises(ValueError, match="`position_mode` must be one of"):
        twins[0].compress(IDS, position_mode=mode)


@pytest.mark.parametrize(
    "arguments", [{"input_ids": IDS[:, :0]}, {"input_ids": IDS[:0]}, {"input_ids": IDS, "position_ids": COUNT[0]}]
)
def test_odd_shapes_of_a_plain_call(twins, arguments):
    """No tokens, no rows, positions of one dimension: refused in the words of plain Llama."""
    errors = []
    for twin in twins:
        with pytest.raises((RuntimeError, IndexError)) as error, torch.no_grad():
            twin(**arguments)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("ids", [IDS[0], IDS.tolist()], ids=["1D", "list"])
def test_a_plain_call_without_columns(twins, ids):
    with pytest.raises(ValueError, match="`input_ids` must be a tensor"):
        twins[0](ids)
