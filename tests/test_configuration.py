"""The compression fields: defaults, round trips, and nonsense refused by name."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from semtoken_hf import SemTokenLlamaConfig, SemTokenLlamaForCausalLM
from semtoken_hf.configuration_semtoken import (
    RENAMED,
    SERVER_MODULE,
    SemTokenConfigMixin,
    SemTokenStaticEncoderConfig,
)
from tests.fixtures.tiny import random_ids, tiny_config, tiny_model

BERT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# No field at its default, so that one that is lost on the way shows.
FIELDS = {
    "compression": False,
    "target_ratio": 3.5,
    "max_slots": 77,
    "similarity_threshold": 0.25,
    "entropy_threshold": 0.5,
    "query_weight": 0.75,
    "max_span_length": 5,
    "num_sink_tokens": 1,
    "recent_window": 9,
    "min_prompt_length": 33,
    "recompress_every": 70,
    "position_mode": "compact",
    "segmentation_mode": "greedy",
    "merge_mode": "representative",
    "merger_base": "mean",
    "merger_rank": 16,
    "adapter_subfolder": "my-adapter_1",
    "adapted_for": {"position_mode": "compact"},
    "encoder_config": {"model_type": "bert", **BERT},
    "encoder_dtype": "bfloat16",
    "encoder_window": 48,
    "encoder_overlap": 6,
    "fingerprint_radius": 4,
    "protected_token_ids": [7, 11],
    "text_markers": {"sentence_ends": [5], "turn_opening": [6, 7]},
}


def test_defaults() -> None:
    config = SemTokenLlamaConfig()
    assert {name: getattr(config, name) for name in FIELDS if name != "encoder_config"} == {
        "compression": True,
        "target_ratio": 2.4,
        "max_slots": None,
        "similarity_threshold": None,
        "entropy_threshold": None,
        "query_weight": 1.0,
        "max_span_length": 256,
        "num_sink_tokens": 4,
        "recent_window": 64,
        "min_prompt_length": 256,
        "recompress_every": None,
        "position_mode": "compact",
        "segmentation_mode": "sentence",
        "merge_mode": "representative",
        "merger_base": "representative",
        "merger_rank": 512,
        "adapter_subfolder": None,
        "adapted_for": None,
        "encoder_dtype": "auto",
        "encoder_window": 128,
        "encoder_overlap": 16,
        "fingerprint_radius": 2,
        "protected_token_ids": None,
        "text_markers": None,
    }
    assert isinstance(config.encoder_config, SemTokenStaticEncoderConfig)
    assert config.model_type == "semtoken_llama"


def test_the_list_of_fields_here_is_complete() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(SemTokenConfigMixin)}
    plain = tiny_config()
    assert all(getattr(plain, name) != value for name, value in FIELDS.items())


@pytest.mark.parametrize("load", [SemTokenLlamaConfig.from_pretrained, AutoConfig.from_pretrained], ids=["own", "auto"])
def test_every_field_survives_saving(tmp_path, load) -> None:
    config = tiny_config(**FIELDS)
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is SemTokenLlamaConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    for name, value in FIELDS.items():
        if name != "encoder_config":
            assert getattr(loaded, name) == value
    assert isinstance(loaded.encoder_config, BertConfig)
    assert loaded.encoder_config.hidden_size == BERT["hidden_size"]


def test_absent_budgets_survive_saving(tmp_path) -> None:
    """None differs from the default ratio and must be written."""
    tiny_config(target_ratio=None, segmentation_mode="greedy", similarity_threshold=0.7).save_pretrained(tmp_path)
    loaded = SemTokenLlamaConfig.from_pretrained(tmp_path)
    assert loaded.target_ratio is None
    assert loaded.similarity_threshold == 0.7


@pytest.mark.parametrize(
    ("value", "kind", "hidden_size"),
    [
        (None, SemTokenStaticEncoderConfig, 64),
        ({"model_type": "semtoken_static", "hidden_size": 48}, SemTokenStaticEncoderConfig, 48),
        (SemTokenStaticEncoderConfig(hidden_size=40), SemTokenStaticEncoderConfig, 40),
        ({"model_type": "bert", **BERT}, BertConfig, 24),
        (BertConfig(**BERT), BertConfig, 24),
    ],
    ids=["none", "static dict", "static typed", "bert dict", "bert typed"],
)
def test_encoder_config_is_typed_and_survives_dict_and_json(value: Any, kind: type, hidden_size: int) -> None:
    config = tiny_config(encoder_config=value)
    for other in (
        config,
        SemTokenLlamaConfig(**config.to_dict()),
        SemTokenLlamaConfig.from_dict(config.to_dict()),
        SemTokenLlamaConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        SemTokenLlamaConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert type(other.encoder_config) is kind
        assert other.encoder_config.hidden_size == hidden_size
        assert other.to_dict() == config.to_dict()
    assert config.to_dict()["encoder_config"]["model_type"] == kind.model_type


def test_two_configurations_do_not_share_an_encoder() -> None:
    first, second = SemTokenLlamaConfig(), SemTokenLlamaConfig()
    first.encoder_config.hidden_size = 8
    assert second.encoder_config.hidden_size == 64


RATIO, UNIT = "finite number >= 1", "number in [0, 1]"
COUNT_FIELDS = {
    "max_slots": 1,
    "max_span_length": 1,
    "num_sink_tokens": 0,
    "recent_window": 0,
    "min_prompt_length": 0,
    "encoder_window": 1,
    "encoder_overlap": 0,
    "fingerprint_radius": 0,
}
MOST = {
    "max_span_length": 1024,
    "merger_rank": 8192,
    "encoder_window": 8192,
    "fingerprint_radius": 256,
}
NONSENSE = [
    *(("target_ratio", value, RATIO) for value in (0.99, 0, -2, float("nan"), float("inf"), "3", True, [2])),
    *((name, low - 1, f"integer >= {low}") for name, low in COUNT_FIELDS.items()),
    *((name, value, f"integer >= {low}") for name, low in COUNT_FIELDS.items() for value in (2.5, "8", True)),
    *((name, None, "integer") for name in COUNT_FIELDS if name != "max_slots"),
    *(("similarity_threshold", value, "number in [-1, 1]") for value in (-1.01, 1.01, float("nan"), "high", True, [0])),
    *(("entropy_threshold", value, UNIT) for value in (-0.01, 1.01, float("nan"), "high", True)),
    *(("position_mode", value, "['original', 'compact']") for value in ("absolute", None, 0)),
    *(("segmentation_mode", value, "['sentence', 'greedy', 'boundary', 'uniform']") for value in ("semantic", None)),
    *(("merge_mode", value, "['mean', 'representative', 'learned']") for value in ("max", None)),
    *(("query_weight", value, "[0, 16]") for value in (-0.1, 17, float("nan"), "high", True)),
    *(("merger_base", value, "['mean', 'representative']") for value in ("learned", None)),
    *(("merger_rank", value, ">= 1") for value in (0, 1.5, True)),
    *(("adapter_subfolder", value, "plain name") for value in ("", "..", "a/b", 3)),
    ("adapted_for", "compact", "dict"),
    *(("protected_token_ids", value, "list of token ids >= 0") for value in ([-1], [True], ["a"], [1.0], 3)),
    ("compression", "no", ""),
    ("encoder_config", "bert", "dict"),
    ("encoder_config", {}, "model_type"),
    ("encoder_config", {"model_type": "no such model"}, "model_type"),
    ("encoder_config", {"model_type": []}, "model_type"),
    *(("encoder_config", {"model_type": "bert", "hidden_size": value}, "hidden_size") for value in (None, "x", 1.5)),
    *(("encoder_config", {"model_type": "semtoken_static", "hidden_size": v}, "hidden_size") for v in (0, "x", 2**62)),
    ("encoder_config", {"model_type": "semtoken_static", "dtype": "no such dtype"}, "no such dtype"),
    ("encoder_config", {"model_type": "semtoken_static", "dtype": "mean"}, "`dtype` is none: 'mean'"),
    ("encoder_config", {"model_type": "bert", "num_hidden_layers": 2**40}, "at most 512"),
    ("num_hidden_layers", 2**40, "at most 512"),
    # What tokens are counted in, and sizes of which tensors are made.
    *((name, 2**63, f"integer >= {low} and <= ") for name, low in COUNT_FIELDS.items()),
    *((name, most + 1, f"<= {most}") for name, most in MOST.items()),
    ("target_ratio", 10**400, RATIO),
    ("protected_token_ids", [2**63], "list of token ids"),
    *((f"{name}_token_id", 2**70, "token id") for name in ("bos", "eos", "pad")),
]


@pytest.mark.parametrize(("name", "value", "allowed"), NONSENSE)
def test_nonsense_is_refused_by_name_and_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises((ValueError, TypeError, StrictDataclassError)) as error:
        tiny_config(**{name: value})
    assert name in str(error.value)
    assert allowed in str(error.value)


def test_the_checks_of_the_family_hold() -> None:
    """Transformers runs them for the plain class and not for what inherits from it."""
    with pytest.raises(StrictDataclassError, match="not a multiple of the number of attention heads"):
        tiny_config(hidden_size=66)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    tiny_config(
        **MOST, num_sink_tokens=2**63 - 1, recent_window=2**63 - 1, min_prompt_length=2**63 - 1, max_slots=2**63 - 1
    )
    tiny_config(
        encoder_config={"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}, encoder_window=32
    )
    tiny_config(target_ratio=1, similarity_threshold=-1, entropy_threshold=0, max_span_length=1, max_slots=1)
    tiny_config(similarity_threshold=1.0, entropy_threshold=1, num_sink_tokens=0, recent_window=0, min_prompt_length=0)
    tiny_config(encoder_window=1, encoder_overlap=0, fingerprint_radius=0, protected_token_ids=[])
    tiny_config(encoder_window=8, encoder_overlap=7)
    tiny_config(encoder_window=32, encoder_config={"model_type": "bert", **BERT, "max_position_embeddings": 32})


@pytest.mark.parametrize(("window", "overlap"), [(16, 16), (8, 16)])
def test_windows_must_advance(window: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"`encoder_overlap` must be in .*\[0, {window}\), got {overlap}"):
        tiny_config(encoder_window=window, encoder_overlap=overlap)


def test_a_window_must_fit_the_encoder() -> None:
    encoder = BertConfig(**BERT, max_position_embeddings=64)
    with pytest.raises(ValueError, match="`encoder_window` must be at most the encoder's 64 positions, got 65"):
        tiny_config(encoder_config=encoder, encoder_window=65)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"similarity_threshold": 0.5},
        {"similarity_threshold": 0.5, "segmentation_mode": "uniform"},
        {"segmentation_mode": "greedy"},
        {"segmentation_mode": "greedy", "similarity_threshold": -1.0},
        {"segmentation_mode": "greedy", "entropy_threshold": 0.5},
    ],
)
def test_something_must_decide_how_far_to_merge(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`target_ratio` or `max_slots`, or `similarity_threshold`"):
        tiny_config(target_ratio=None, **fields)
    tiny_config(target_ratio=None, max_slots=100, **fields)


def test_a_threshold_alone_is_enough_in_greedy_mode() -> None:
    assert tiny_config(target_ratio=None, segmentation_mode="greedy", similarity_threshold=0).target_ratio is None


def test_a_checkpoint_of_before_is_read_in_the_sentence_mode() -> None:
    old = {"segmentation_mode": "greedy", "similarity_threshold": -1.0, "recency": 2.0, "max_span_length": 16}
    config = SemTokenLlamaConfig(**old)
    assert (config.segmentation_mode, config.similarity_threshold, config.max_span_length) == ("sentence", None, 16)
    assert "recency" not in config.to_dict()
    assert SemTokenLlamaConfig(**{**old, "recency": 0.0}).segmentation_mode == "greedy"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


def load_model_config(folder, **overrides: Any) -> SemTokenLlamaConfig:
    return SemTokenLlamaForCausalLM.from_pretrained(folder, **overrides).config


each_loader = pytest.mark.parametrize(
    "load", [SemTokenLlamaConfig.from_pretrained, load_model_config], ids=["configuration", "model"]
)


@each_loader
def test_from_pretrained_overrides_fields(checkpoint, load) -> None:
    config = load(checkpoint, target_ratio=4, segmentation_mode="greedy", protected_token_ids=[5])
    assert (config.target_ratio, config.segmentation_mode, config.protected_token_ids) == (4, "greedy", [5])
    assert config.max_span_length == tiny_config().max_span_length


@each_loader
@pytest.mark.parametrize(
    ("name", "value"), [("target_ratio", 0.5), ("segmentation_mode", "greddy"), ("max_span_length", 0)]
)
def test_from_pretrained_refuses_nonsense_too(checkpoint, load, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        load(checkpoint, **{name: value})


def test_the_server_of_transformers_finds_the_architecture(tmp_path, monkeypatch):
    """It looks in its own copy of the module `transformers`; where no server runs, nothing is named anywhere."""
    name = "SemTokenLlamaForCausalLM"
    tiny_config(architectures=["LlamaForCausalLM", "SemTokenLlamaModel", name]).save_pretrained(tmp_path)
    own = types.SimpleNamespace(AutoModelForCausalLM=AutoModelForCausalLM)
    monkeypatch.setitem(sys.modules, SERVER_MODULE, types.SimpleNamespace(transformers=own))
    # A server that ran in this process has named it.
    monkeypatch.delattr(transformers, name, raising=False)
    SemTokenLlamaConfig.from_pretrained(tmp_path)
    assert vars(own) == {"AutoModelForCausalLM": AutoModelForCausalLM, name: AutoModelForCausalLM}
    assert not hasattr(transformers, name)


def test_names_of_before_stand_for_the_new_ones(tmp_path) -> None:
    """Given, read, set and loaded; saved under the new names alone."""
    config = tiny_config(keep_last=9)
    assert (config.recent_window, config.keep_last) == (9, 9)
    config.max_kept_tokens = 50
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_slots"] == 50
    assert not {"keep_first", "keep_last", "max_kept_tokens"} & saved.keys()
    (tmp_path / "config.json").write_text(json.dumps({**saved, "keep_first": 7}))
    loaded = AutoConfig.from_pretrained(tmp_path, keep_last=5)
    assert (loaded.num_sink_tokens, loaded.recent_window) == (7, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("target_ratio", -3), ("segmentation_mode", "typo"), ("keep_first", -1), ("query_weight", "much")],
)
def test_nonsense_is_refused_when_it_is_set(name, value) -> None:
    """The configuration of a loaded model stays what it was, so that what is saved can be loaded."""
    config = tiny_model().config
    before = getattr(config, name)
    with pytest.raises(ValueError, match=RENAMED.get(name, name)):
        setattr(config, name, value)
    assert getattr(config, name) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint_radius": 50}, "`fingerprint_radius` is read when a model is loaded"),
        ({"merge_mode": "learned"}, "without a learned merger"),
        ({"target_ratio": None}, "set `target_ratio` or `max_slots`"),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_the_next_call(fields, message) -> None:
    model = tiny_model()
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 64), logits_to_keep=1)
