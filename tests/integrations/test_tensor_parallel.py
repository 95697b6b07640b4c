"""Tensor parallel on two processes: every rank plans the same, and all say what one process says."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_ranks
from tests.fixtures.tiny import BERT, FEW, plain_twin, random_ids, tiny_model
from tests.integrations.parallel_child import __name__ as child
from tests.integrations.parallel_child import prompts, read, train

LEARNED = {"merge_mode": "learned", "merger_rank": 4}
TRANSFORMER = {"encoder_config": dict(BERT), "encoder_window": 48}
# Encoders of the model's own family have layers of the names that its plan shards.
LLAMA_ENCODER = {**BERT, "model_type": "llama", "num_key_value_heads": 2}
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PROJECTIONS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def make_models():
    models = {
        "learned": tiny_model(**LEARNED, **TRANSFORMER, tie_word_embeddings=True),
        "llama encoder": tiny_model(encoder_config=LLAMA_ENCODER, encoder_window=48),
        **{family: tiny_model(family=family) for family in FEW if family != "llama"},
        "adapter": adapted_model(merger_base="mean"),
    }
    torch.nn.init.normal_(models["learned"].model.learned_merger.out_proj, generator=torch.Generator().manual_seed(1))
    return models


MODELS = make_models()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder, and what each rank found."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, model in MODELS.items():
        model.save_pretrained(folder / "plain" / name)
    return folder, run_ranks(child, folder, "tensor_parallel", "pipeline_parallel")


def of_code_path(ranks, code_path, name=None):
    """What each rank found on a code path."""
    return [facts[code_path] if name is None else facts[code_path][name] for facts in ranks[1]]


def load(ranks, name, path="plain"):
    return AutoModelForCausalLM.from_pretrained(ranks[0] / path / name).eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_reads_as_one_process_does(ranks, name):
    expected = read(load(ranks, name))
    assert (expected["plan"].amax(1) + 1 < prompts()[1].sum(1)).all()
    for facts in of_code_path(ranks, "tensor_parallel", name):
        assert torch.equal(facts["plan"], expected["plan"])
        for key in ("logits", "off", "slots"):
            torch.testing.assert_close(facts[key], expected[key], **CLOSE)
        for way in ("greedy", "beams", "ratio"):
            assert torch.equal(facts[way]["tokens"], expected[way]["tokens"])
            assert torch.equal(facts[way]["slots"], expected[way]["slots"])
            # Each rank holds the keys and values of its heads.
            assert facts[way]["bytes"] * 2 == expected[way]["bytes"]
    # Bit for bit what the other rank has, logits included.
    first, second = of_code_path(ranks, "tensor_parallel", name)
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["slots"], second["slots"])


@pytest.mark.parametrize("name", ["learned", "llama encoder", "gpt_neox"])
def test_every_rank_trains_as_one_process_does(ranks, name):
    expected = train(load(ranks, name))
    assert (expected["kept"] < 70).all()
    for facts in of_code_path(ranks, "tensor_parallel", name):
        torch.testing.assert_close(facts["loss"], expected["loss"], **CLOSE)
        assert facts["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            ours = facts["gradients"][parameter]
            assert (ours is None) == (gradient is None), parameter
            if gradient is not None:
                torch.testing.assert_close(ours, gradient, **CLOSE, msg=lambda m, p=parameter: f"{p}: {m}")
        assert any("learned_merger" in n for n in facts["gradients"]) == (name == "learned")


@pytest.mark.parametrize("name", ["llama encoder", "gpt_neox", "adapter"])
def test_the_plan_shards_the_decoder_and_never_the_encoder(ranks, name):
    for facts in of_code_path(ranks, "tensor_parallel", name):
        sharded = {key.removesuffix(".weight").split(".lora_")[0] for key in facts["sharded"]}
        sharded = {key.removesuffix(".base_layer") for key in sharded}
        if name != "gpt_neox":
            decoder = {f"model.layers.{layer}.{part}" for layer in range(2) for part in PROJECTIONS}
            assert decoder <= sharded <= decoder | {"lm_head", "model.embed_tokens"}
        assert len(sharded) > 8
        assert not any("semantic_encoder" in part or "learned_merger" in part for part in sharded)
        assert facts["frozen"]


@pytest.mark.parametrize("name", ["learned", "adapter"])
def test_saved_tensors_are_whole(ranks, name):
    again, expected = (load(ranks, name, path).state_dict() for path in ("saved", "plain"))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_pipeline_stages_are_refused(ranks):
    """Later stages see no tokens. Without compression they run, and are exactly Llama."""
    expected = plain_twin(MODELS["learned"]).generate(random_ids(1, 96), max_new_tokens=4, do_sample=False)
    for facts in of_code_path(ranks, "pipeline_parallel"):
        assert "tensor parallelism" in facts["refusal"]
        assert torch.equal(facts["tokens"], expected)
