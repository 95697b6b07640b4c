"""The encoder of a conversion: its first layers, and its dtype."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from semtoken_hf import SpanPlanner, convert_checkpoint
from semtoken_hf.conversion.encoder import keep_layers, load_encoder
from tests.conversion.checkpoints import VOCAB_SIZE


@torch.no_grad()
def test_the_first_layers_are_the_original_ones(encoder_folder):
    original, ids = AutoModel.from_pretrained(encoder_folder).eval(), torch.randint(5, 50, (1, 20))
    states = original(ids, output_hidden_states=True).hidden_states
    assert torch.equal(load_encoder(encoder_folder)(ids).last_hidden_state, states[2])
    short = load_encoder(encoder_folder, 1)
    assert short.config.num_hidden_layers == 1
    assert torch.equal(short(ids).last_hidden_state, states[1])
    assert not torch.equal(states[1], states[2])


@torch.no_grad()
def test_an_architecture_that_calls_its_layers_otherwise(tmp_path):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["distilbert"](vocab_size=60, dim=32, hidden_dim=48, n_layers=3, n_heads=2)
    original = AutoModel.from_config(config).eval()
    original.save_pretrained(tmp_path)
    short, ids = load_encoder(tmp_path, 2), torch.randint(5, 50, (1, 20))
    assert short.config.n_layers == 2
    second = original(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(short(ids).last_hidden_state, second)


def test_an_architecture_without_a_plain_stack_is_refused():
    with pytest.raises(ValueError, match="a funnel has no plain stack"):
        keep_layers(CONFIG_MAPPING["funnel"](), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cheaper_encoder_plans_after_loading(make_llama, encoder_folder, tmp_path, dtype):
    out = convert_checkpoint(
        make_llama(), encoder_folder, tmp_path / "out", encoder_layers=1, encoder_dtype=dtype, progress=False
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    encoder = model.model.semantic_encoder
    assert (model.config.encoder_dtype, model.config.encoder_config.num_hidden_layers) == (dtype, 1)
    assert len(encoder.encoder.encoder.layer) == 1
    assert {p.dtype for p in encoder.parameters()} == {getattr(torch, dtype)}
    (file,) = [f for f in sorted(out.glob("*.safetensors")) if _holds_encoder(f)]
    with safe_open(file, "pt") as handle:
        assert {handle.get_tensor(k).dtype for k in handle.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    ids = torch.randint(3, VOCAB_SIZE, (1, 400))
    plan = model.compress(ids).span_ids
    assert torch.equal(SpanPlanner.from_pretrained(out).plan(ids).span_ids, plan)
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    assert torch.equal(half.compress(ids).span_ids, plan)


def _holds_encoder(file) -> bool:
    with safe_open(file, "pt") as handle:
        return any("semantic_encoder" in key for key in handle.keys())  # noqa: SIM118


def test_a_table_is_float32(make_llama, encoder_folder, tmp_path):
    out = convert_checkpoint(
        make_llama(), encoder_folder, tmp_path / "out", encoder_kind="static", static_dim=8, progress=False
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model.config.encoder_dtype == "float32"
    assert {p.dtype for p in model.model.semantic_encoder.parameters()} == {torch.float32}
