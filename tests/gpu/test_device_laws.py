"""What depends on the device alone: plans, waiting for it, continuous batching."""

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from semtoken_hf.gpu_suite.equivalence import FIELDS, LENGTHS, PLANS, RATIO, SHAPE
from semtoken_hf.gpu_suite.host_syncs import HostSyncs
from semtoken_hf.gpu_suite.models import build_model, prompts
from tests.fixtures.batching import model_of, prompts_of, settings


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("encoder", ["static", "transformer"])
def test_plans_are_those_of_the_processor(encoder, plan, device):
    on_cpu = build_model(SHAPE, "cpu", encoder=encoder, **{**FIELDS, **PLANS[plan]})
    batch = prompts(LENGTHS)
    ids, mask = batch.input_ids, batch.attention_mask
    wanted = on_cpu.compress(ids, mask, target_ratio=RATIO)
    assert wanted.is_merged
    on_device = on_cpu.to(device, torch.bfloat16)
    plan = on_device.compress(ids.to(device), mask.to(device), target_ratio=RATIO)
    assert torch.equal(plan.span_ids.cpu(), wanted.span_ids)
    assert torch.equal(plan.position_ids.cpu(), wanted.position_ids)


def test_a_step_of_decoding_never_waits(device):
    model = build_model(SHAPE, device, **FIELDS)
    out = model(prompts(LENGTHS[:1], device).input_ids, logits_to_keep=1, target_ratio=RATIO)
    token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step():
        return model(token, past_key_values=out.past_key_values, logits_to_keep=1)

    step()
    with HostSyncs(device, forbid=True):
        step()
    assert out.past_key_values.get_seq_length() == LENGTHS[0] + 2


def test_what_waits_is_seen(device):
    values = torch.arange(4, device=device)
    with pytest.raises(RuntimeError, match="synchroniz"), HostSyncs(device, forbid=True):
        bool((values > 2).any())
    with HostSyncs(device) as syncs:
        int(values.sum())
        values[values > 1]
        values.tolist()
    assert syncs.count >= 3
    assert all(place.startswith("test_device_laws.py") for place in syncs.places)


@pytest.mark.parametrize("encoder", ["static", "transformer"])
def test_the_stage_waits_once(encoder, device):
    model, batch = build_model(SHAPE, device, encoder=encoder, **FIELDS), prompts(LENGTHS, device)
    model.compress(batch.input_ids, batch.attention_mask, target_ratio=RATIO)
    with HostSyncs(device) as syncs:
        model.compress(batch.input_ids, batch.attention_mask, target_ratio=RATIO)
    assert syncs.count == 1, syncs.places


def test_generate_batch_equals_generate(device):
    from tests.fixtures.batching import NEW_TOKENS

    fields = {
        name: False for name in ("auto_switch_to_flash",) if name in ContinuousBatchingConfig.__dataclass_fields__
    }
    # Made for this test: the cached one of other tests stays where it is.
    model = model_of.__wrapped__().to(device)
    prompts = prompts_of((96, 40, 70))
    outputs = model.generate_batch(prompts, **settings(**fields))
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.error is None
        ids = torch.tensor([prompt], device=device)
        alone = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()
