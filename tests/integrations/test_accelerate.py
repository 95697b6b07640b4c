"""accelerate: models spread over devices, the CPU and the disk, made without storage, and prepared for training."""

import copy
from collections import OrderedDict

import pytest
import torch
from accelerate import (
    Accelerator,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from semtoken_hf import SemTokenLlamaForCausalLM
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import BERT, ragged_prompts, random_ids, tiny_model
from tests.integrations.pretend_devices import place_of, spread

TRANSFORMER = {"encoder_config": dict(BERT), "encoder_window": 48}
LEARNED = {"merge_mode": "learned", "merger_rank": 4}
KINDS = {
    "transformer, learned, tied": {**TRANSFORMER, **LEARNED, "tie_word_embeddings": True},
    "adapter": {**TRANSFORMER, "merger_base": "mean"},
    "gpt_neox": {"family": "gpt_neox"},
}
IDS, MASK = ragged_prompts()


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its settings for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(kind):
    if kind == "adapter":
        return adapted_model(**KINDS[kind])
    model = tiny_model(**KINDS[kind])
    if model.base_model.learned_merger is not None:
        torch.nn.init.normal_(model.base_model.learned_merger.out_proj, generator=torch.Generator().manual_seed(1))
    return model


def parts_of(model):
    """What a model is split into, where a decoder layer and the encoder stay in one piece."""
    names = []
    for name, child in model.base_model.named_children():
        names += [f"layers.{i}" for i in range(len(child))] if name == "layers" else [name]
    return [f"{model.base_model_prefix}.{name}" for name in names] + ["lm_head"]


@torch.no_grad()
def facts(model):
    """Everything that reads through the stage: logits, plan, generated tokens, and the slots alone."""
    outputs = model(IDS, attention_mask=MASK, logits_to_keep=2)
    generated = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    slots = model.compress(IDS, MASK).inputs_embeds
    off = model(IDS, attention_mask=MASK, logits_to_keep=2, compression=False).logits
    assert (outputs.compressed_lengths < MASK.sum(1)).any()
    return {"logits": outputs.logits, "plan": outputs.span_ids, "tokens": generated, "slots": slots, "off": off}


def assert_same(ours, theirs):
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), expected, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A model, its folder, and what it says undispatched."""
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp("accelerate")
    model.save_pretrained(folder)
    return model, folder, facts(model)


def some_on_disk(model):
    """Early parts on the CPU; the last layer, the encoder and the merger on the disk."""
    on_disk = ("layers.1", "semantic_encoder", "learned_merger")
    return {part: "disk" if part.endswith(on_disk) else "cpu" for part in parts_of(model)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_loaded_with_a_device_map(saved, tmp_path):
    model, folder, expected = saved
    device_map = some_on_disk(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
    assert all(p.is_meta for n, p in loaded.named_parameters() if "semantic_encoder" in n)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "semantic_encoder" in n)
    assert_same(facts(loaded), expected)


DISPATCHES = {
    "dispatch_model": lambda model, folder: dispatch_model(model, some_on_disk(model), offload_dir=folder),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatched(saved, tmp_path, dispatch):
    model, _, expected = saved
    dispatched = DISPATCHES[dispatch](copy.deepcopy(model), str(tmp_path))
    assert all(p.is_meta for n, p in dispatched.named_parameters() if "semantic_encoder" in n)
    assert_same(facts(dispatched), expected)


def test_made_empty_and_filled_from_a_checkpoint(tmp_path):
    model = make_model("transformer, learned, tied")
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    assert type(empty) is SemTokenLlamaForCausalLM
    assert all(p.is_meta for p in empty.parameters())
    empty.tie_weights()
    device_map = some_on_disk(model)
    filled = load_checkpoint_and_dispatch(empty, tmp_path / "model", device_map, offload_folder=tmp_path / "disk")
    assert_same(facts(filled.eval()), facts(model))


def test_no_layer_and_no_encoder_is_split():
    config = make_model("transformer, learned, tied").config
    with init_empty_weights():
        model = SemTokenLlamaForCausalLM(config)
    model.tie_weights()
    assert {"LlamaDecoderLayer", "SemanticEncoder"} <= set(model._no_split_modules)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    maps = set()
    for share in range(50, 150, 5):
        memory = OrderedDict({"cpu": whole * share // 100, "disk": 10 * whole})
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        maps.add(tuple(device_map.items()))
        for name in device_map:
            assert "layers." not in name or name.count(".") == 2, name
            assert "semantic_encoder." not in name, name
    assert len(maps) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus(kind):
    """Pretended ones: a tied head lives with the embeddings, the encoder and the merger with the last layer."""
    model = make_model(kind)
    expected = facts(model)
    labels = IDS.where(torch.arange(IDS.shape[1]) > 80, -100)
    loss = model(IDS, attention_mask=MASK, labels=labels).loss
    first = ("embed_tokens", "embed_in", "layers.0", "lm_head")
    device_map = {part: "cuda:0" if part.endswith(first) else "cuda:1" for part in parts_of(model)}
    with spread(model, device_map), torch.no_grad():
        ids, mask = IDS.to("cuda:0"), MASK.to("cuda:0")
        outputs = model(ids, attention_mask=mask, logits_to_keep=2)
        assert place_of(outputs.logits) == torch.device("cuda:0")
        torch.testing.assert_close(outputs.logits.cpu(), expected["logits"])
        prompt = model.compress(ids, mask)
        assert place_of(prompt.inputs_embeds) == place_of(prompt.span_ids) == torch.device("cuda:0")
        torch.testing.assert_close(prompt.inputs_embeds.cpu(), expected["slots"])
        ours = model(ids, attention_mask=mask, labels=labels.to("cuda:0")).loss
        torch.testing.assert_close(ours.cpu(), loss)
        # A plan and a mask from a data loader come on the CPU.
        protected = torch.zeros_like(MASK)
        given = model(ids, attention_mask=mask, logits_to_keep=2, span_ids=expected["plan"], protected_mask=protected)
        torch.testing.assert_close(given.logits.cpu(), expected["logits"])
        for arguments in ({}, {"num_beams": 2}, {"prefill_chunk_size": 16}):
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **arguments)
            assert place_of(tokens) == torch.device("cuda:0")
            if not arguments.get("num_beams"):
                assert torch.equal(tokens.cpu(), expected["tokens"])


@pytest.mark.usefixtures("fresh_accelerator")
def test_prepared_for_training():
    """The gradients of a plain loop; the encoder is left out, and the model comes back out of its wrapper."""
    model = tiny_model(**LEARNED, **TRANSFORMER).train()
    twin = copy.deepcopy(model)
    ids = random_ids(2, 96)
    labels = ids.where(torch.arange(96) > 70, -100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    outputs = prepared(input_ids=ids, labels=labels, target_ratio=3.0)
    assert (outputs.compressed_lengths < 60).all()
    accelerator.backward(outputs.loss)
    reference = twin(input_ids=ids, labels=labels, target_ratio=3.0)
    reference.loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in accelerator.unwrap_model(prepared).named_parameters():
        if "semantic_encoder" in name:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter.grad, gradients[name])
            torch.testing.assert_close(parameter, before[name] - 0.1 * gradients[name])
