"""Law 10: what cannot be compressed runs exactly as the plain model, with one warning; nonsense is refused."""

import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from semtoken_hf import SemTokenCache, SemTokenLlamaForCausalLM
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import BERT, plain_twin, ragged_prompts, random_ids, tiny_config, tiny_model

TOKENS = 48


@pytest.fixture(scope="module")
def twins():
    model = tiny_model(attn_implementation="eager")
    return model, plain_twin(model)


def four_dimensional_mask():
    return torch.full((2, 1, TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)


FORWARD = {
    "inputs_embeds": (
        lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids), "logits_to_keep": 1},
        "inputs_embeds",
    ),
    "4D mask": (
        lambda model, ids: {"input_ids": ids, "attention_mask": four_dimensional_mask(), "logits_to_keep": 1},
        "2D mask",
    ),
    "static cache": (
        lambda model, ids: {
            "input_ids": ids,
            "past_key_values": StaticCache(config=model.config, max_cache_len=64),
            "logits_to_keep": 1,
        },
        "StaticCache",
    ),
    "dynamic cache": (
        lambda model, ids: {"input_ids": ids, "past_key_values": DynamicCache(), "logits_to_keep": 1},
        "DynamicCache",
    ),
    "paged cache": (
        # As from a paged cache that no manager of ours fills; eager attention looks at none of it.
        lambda model, ids: {"input_ids": ids, "cache": object(), "block_table": None, "logits_to_keep": 1},
        "continuous batching",
    ),
    "shifted labels": (
        lambda model, ids: {"input_ids": ids, "labels": ids, "shift_labels": ids.where(ids > 200, -100)},
        "shift_labels",
    ),
    "packed sequences": (
        lambda model, ids: {"input_ids": ids, "position_ids": torch.arange(24).repeat(2, 2), "logits_to_keep": 1},
        "packed",
    ),
    **{
        f"packed sequences by {name}": (
            lambda model, ids, marks=marks: {"input_ids": ids, "logits_to_keep": 1, **marks},
            f"`{name}` means packed",
        )
        for name, marks in {
            "cu_seq_lens_q": dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], torch.tensor([0, 20, TOKENS])),
            "seq_idx": {"seq_idx": (torch.arange(TOKENS) > 20).int()[None]},
        }.items()
    },
}
GENERATE = {
    "without cache": ({"use_cache": False}, "use_cache=False"),
    "dynamic cache": ({"past_key_values": DynamicCache}, "DynamicCache"),
    "padding on the right": (
        {"attention_mask": (torch.arange(TOKENS) < torch.tensor([[TOKENS], [30]])).long()},
        "right",
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_falls_back(twins, caplog, case):
    model, plain = twins
    build, reason = FORWARD[case]
    ids = random_ids(2, TOKENS)
    for _ in range(2):
        with torch.no_grad():
            ours, theirs = (twin(**build(twin, ids)) for twin in (model, plain))
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.loss is theirs.loss is None or torch.equal(ours.loss, theirs.loss)
    (message,) = warnings_of(caplog)
    assert reason in message
    assert "does not compress" in message


@pytest.mark.parametrize("attention", ["sdpa", "semtoken_varlen"])
def test_packed_sequences_do_not_fit_behind_slots(attention):
    model, ids, cache = tiny_model(attn_implementation=attention), random_ids(1, 60), SemTokenCache()
    ends = torch.tensor([0, 20, TOKENS])
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        with pytest.raises(ValueError, match="`cu_seq_lens_q` counts no merged slots"):
            model(ids[:, :TOKENS], past_key_values=cache, logits_to_keep=1, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("case", GENERATE)
def test_generate_falls_back(twins, caplog, case):
    arguments, reason = GENERATE[case]
    ids, mask = ragged_prompts((TOKENS, 30))
    ours, theirs = (
        twin.generate(
            ids,
            max_new_tokens=4,
            output_scores=True,
            return_dict_in_generate=True,
            **{"attention_mask": mask, **{n: v() if isinstance(v, type) else v for n, v in arguments.items()}},
        )
        for twin in twins
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert torch.equal(a, b)
    (message,) = warnings_of(caplog)
    assert reason in message


def test_generate_from_embeddings(twins, caplog):
    model, plain = twins
    embeddings = model.get_input_embeddings()(random_ids(1, TOKENS))
    ours, theirs = (twin.generate(inputs_embeds=embeddings, max_new_tokens=4) for twin in (model, plain))
    assert torch.equal(ours, theirs)
    (message,) = warnings_of(caplog)
    assert "inputs_embeds" in message


def test_what_compresses_is_quiet(twins, caplog):
    model = twins[0]
    ids, mask = ragged_prompts((TOKENS, 40))
    model(ids, attention_mask=mask, logits_to_keep=1)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert not warnings_of(caplog)


IDS = random_ids(2, TOKENS)
COUNT = torch.arange(TOKENS).repeat(2, 1)


def mask_of(rows, columns):
    """With padding, since `generate` drops a mask of ones before anybody can look at it."""
    return (torch.arange(columns) > 3).long().repeat(rows, 1)


REFUSED = {
    "attention_mask short": ({"attention_mask": mask_of(2, TOKENS - 1)}, "`attention_mask`.*shape"),
    "attention_mask long": ({"attention_mask": mask_of(2, TOKENS + 3)}, "`attention_mask`.*shape"),
    "attention_mask rows": ({"attention_mask": mask_of(1, TOKENS)}, "`attention_mask`.*shape"),
    "protected_mask short": ({"protected_mask": torch.ones(2, TOKENS - 1)}, "`protected_mask`"),
    "protected_mask rows": ({"protected_mask": torch.ones(3, TOKENS)}, "`protected_mask`.*shape"),
    "protected_mask 1D": ({"protected_mask": torch.ones(TOKENS)}, "`protected_mask`.*shape"),
    "protected_mask list": ({"protected_mask": [[1] * TOKENS] * 2}, "`protected_mask`"),
    "span_ids short": ({"span_ids": COUNT[:, 1:]}, "`span_ids`"),
    "span_ids rows": ({"span_ids": COUNT[:1]}, "`span_ids`.*shape"),
    "span_ids floats": ({"span_ids": COUNT.float()}, "`span_ids` must hold integers"),
    "span_ids gap": ({"span_ids": COUNT * 2}, "`span_ids`.*count 0, 1, 2"),
    "span_ids from one": ({"span_ids": COUNT + 1}, "`span_ids`.*count 0, 1, 2"),
    "span_ids backwards": ({"span_ids": COUNT.flip(1)}, "`span_ids`.*count 0, 1, 2"),
    "span_ids padding": ({"span_ids": COUNT.where(COUNT > 0, -1) - (COUNT > 0).long()}, "`span_ids`.*-1 exactly"),
    "ratio below one": ({"target_ratio": 0.5}, "`target_ratio`.*>= 1"),
    "ratio NaN": ({"target_ratio": float("nan")}, "`target_ratio`.*>= 1"),
    "ratio infinite": ({"target_ratio": float("inf")}, "`target_ratio`.*finite"),
    "ratio text": ({"target_ratio": "2"}, "`target_ratio`.*number"),
    "ratio bool": ({"target_ratio": True}, "`target_ratio`.*number"),
    "position_ids short": ({"position_ids": COUNT[:, 1:]}, "`position_ids`.*shape"),
    "position_ids rows": ({"position_ids": COUNT.repeat(2, 1)}, "`position_ids`.*shape"),
    "position_ids list": ({"position_ids": COUNT.tolist()}, "`position_ids`.*shape"),
}
# Of `generate`, Transformers would stumble over these first.
REFUSED_BY_GENERATE = [case for case in REFUSED if not case.startswith("position_ids")]


@pytest.mark.parametrize(
    ("call", "case"),
    [
        *((call, case) for call in ("forward", "compress") for case in REFUSED),
        *(("generate", case) for case in REFUSED_BY_GENERATE),
    ],
)
def test_refused(twins, call, case):
    model = twins[0]
    arguments, message = REFUSED[case]
    run = {
        "compress": model.compress,
        "forward": functools.partial(model, logits_to_keep=1),
        "generate": functools.partial(model.generate, max_new_tokens=2),
    }[call]
    with pytest.raises(ValueError, match=message):
        run(IDS, **arguments)


def test_unknown_argument(twins):
    with pytest.raises(ValueError, match="target_ration"):
        twins[0].generate(IDS, max_new_tokens=2, target_ration=2.0)


def test_plain_checkpoint(twins, tmp_path):
    twins[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no semantic encoder.*convert_checkpoint"):
        type(twins[0]).from_pretrained(tmp_path)
    # Uniform spans need none.
    uniform = {"segmentation_mode": "uniform", "min_prompt_length": 16, "recent_window": 4}
    model = type(twins[0]).from_pretrained(tmp_path, **uniform)
    assert model.compress(IDS).is_merged


def test_plain_checkpoint_and_an_encoder_that_nothing_reads(twins, tmp_path):
    """Zeros, not what the memory held."""
    twins[1].save_pretrained(tmp_path)
    config = tiny_config(segmentation_mode="uniform", encoder_config=dict(BERT), encoder_window=48)
    model = SemTokenLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    parameters = list(model.model.semantic_encoder.parameters())
    assert len(parameters) > 10
    assert not any(p.any() for p in parameters)


@pytest.mark.parametrize(
    ("mode", "ratio", "said"),
    [
        ("original", 2.4, "96 tokens in original positions are more than the model's 64"),
        ("compact", 1.2, "80 slots are more than the model's 64"),
        ("compact", 1.5, None),
    ],
)
def test_more_positions_than_trained(caplog, mode, ratio, said):
    model = tiny_model(position_mode=mode, max_position_embeddings=64)
    model(random_ids(1, 96), logits_to_keep=1, target_ratio=ratio)
    messages = warnings_of(caplog)
    assert [said in message for message in messages] == ([] if said is None else [True])
    assert all("position_mode='compact' with target_ratio=1.5 fits" in message for message in messages)


def test_sliding_windows_count_slots(caplog):
    """A prompt that is longer than the window says so; compact positions keep the distances of the plain model."""
    ids = random_ids(1, TOKENS)
    for fields, warned in (({}, True), ({"position_mode": "compact"}, False), ({"sliding_window": 64}, False)):
        caplog.clear()
        model = tiny_model(family="mistral", **{"sliding_window": 24, **fields})
        model(ids, logits_to_keep=1)
        assert [("sliding_window" in m) for m in warnings_of(caplog)] == [True] * warned


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_too_short_to_compress_is_quiet(twins, caplog, arguments, padded):
    """Nothing would be compressed anyway."""
    ids, mask = ragged_prompts((12, 9) if padded else (12, 12))
    ours, theirs = (twin.generate(ids, attention_mask=mask, max_new_tokens=3, **arguments) for twin in twins)
    assert torch.equal(ours, theirs)
    assert not warnings_of(caplog)
