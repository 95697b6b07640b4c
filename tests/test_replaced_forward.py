"""Trainers that put a head of their own on a model, or call its base model: slots where they say what they read."""

import copy
import functools
import types

import peft
import pytest
import torch

from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import left_padded, plain_twin, random_ids, tiny_model

CHAT = {"segmentation_mode": "sentence", "text_markers": {"turn_opening": [7], "turn_ending": [8]}}
TOKENS, SCORED = 120, 10


def fused_forward(self, *args, labels=None, shift_labels=None, **kwargs):
    """Log-probability of every label, zero where there is none, as TRL's fused heads call the base model."""
    states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
    targets = shift_labels if shift_labels is not None else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logp = self.get_output_embeddings()(states).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return logp.masked_fill(targets == -100, 0)


def fuse(model):
    model.forward = types.MethodType(fused_forward, model)
    return model


def widths(model):
    """Positions that the first layer reads, in each call from here on."""
    seen = []
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def scored(ids, count=SCORED):
    return ids.where(torch.arange(ids.shape[1]) >= ids.shape[1] - count, -100)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fused_head_trains_as_the_models_own(family):
    ids = random_ids(2, TOKENS)
    gradients = []
    for fused in (False, True):
        model = tiny_model(family=family).train()
        seen = widths(model)
        loss = -fuse(model)(ids, labels=scored(ids)).sum() / 20 if fused else model(ids, labels=scored(ids)).loss
        loss.backward()
        assert seen == [56]
        gradients.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"position_mode": "compact"}, CHAT], ids=["original", "compact", "chat"])
def test_rollouts_and_training_agree(fields):
    """Prompts are padded on the left, completions on the right; in a chat the question is found in both."""
    model = tiny_model(**fields, eos_token_id=None)
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (90, 61)])
    ids[:, -30], ids[:, -8], ids[:, -3] = 7, 8, 7
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    completion, rolled = out.sequences[:, 90:], torch.stack(out.logits, 1).log_softmax(-1)
    expected = rolled.gather(2, completion[..., None])[..., 0]
    kept = torch.arange(12) < torch.tensor([[12], [5]])
    sequences = torch.cat([ids, completion.where(kept, 0)], 1)
    whole = torch.cat([mask, kept.long()], 1)
    labels = scored(sequences, 12).masked_fill(whole == 0, -100)
    seen = widths(fuse(model).train())
    trained = model(sequences, attention_mask=whole, labels=labels)[:, -13:-1]
    assert seen[0] < 70
    assert (trained - expected)[kept].abs().max() < 1e-4


def test_peft_calls_the_forward_that_was_replaced():
    model = fuse(tiny_model())
    ids, seen = random_ids(1, TOKENS), widths(model)
    expected = model(ids, labels=scored(ids))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(wrapped(ids, labels=scored(ids)), expected)
    assert seen == [56, 56]


def test_a_copy_reads_with_its_own_weights():
    model = fuse(tiny_model())
    twin, ids = copy.deepcopy(model), random_ids(1, TOKENS)
    expected = model(ids, labels=scored(ids))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert torch.equal(twin(ids, labels=scored(ids)), expected)


@pytest.mark.parametrize("wrap", [functools.partial, lambda forward: forward], ids=["wrapped", "set back"])
def test_a_wrapper_around_the_models_own_forward_changes_nothing(wrap):
    model, ids = tiny_model(), random_ids(1, TOKENS)
    expected = model(ids, labels=scored(ids))
    model.forward = wrap(model.forward)
    outputs = model(ids, labels=scored(ids))
    assert torch.equal(outputs.span_ids, expected.span_ids)
    assert torch.equal(outputs.loss, expected.loss)


IDS = random_ids(1, TOKENS)
ENDS = torch.tensor([0, 50, TOKENS], dtype=torch.int32)
PLAIN = {
    "labels on everything": ({"labels": IDS}, "all positions are scored: nothing can merge"),
    "shifted labels": ({"shift_labels": scored(IDS)}, "`shift_labels` is not supported"),
    "packed": ({"labels": scored(IDS), "cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}, "`cu_seq_lens_q` means packed"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_fused_head_is_plain_with_one_warning(case, caplog):
    (arguments, reason), model = PLAIN[case], tiny_model(attn_implementation="eager")
    plain = fuse(plain_twin(model).train())
    fuse(model).train()
    for _ in range(2):
        assert torch.equal(model(IDS, **arguments), plain(IDS, **arguments))
    (message,) = warnings_of(caplog)
    assert reason in message


def test_a_base_model_that_is_called_by_itself(caplog):
    """Who calls it expects a state for each token: plain with one warning, or slots where it says what it reads."""
    model = tiny_model(attn_implementation="eager")
    expected = plain_twin(model).base_model(IDS).last_hidden_state
    for _ in range(2):
        assert torch.equal(model.base_model(IDS).last_hidden_state, expected)
    (message,) = warnings_of(caplog)
    assert "called by itself" in message
    seen = widths(model)
    states = model.base_model(IDS, logits_to_keep=SCORED).last_hidden_state
    logits = model.get_output_embeddings()(states)
    assert seen[0] < 70
    torch.testing.assert_close(logits[:, -SCORED:], model(IDS, logits_to_keep=SCORED).logits)
    assert not states[:, :-SCORED].any()
    assert model.base_model(IDS, compression=True).last_hidden_state.shape[1] < 70


def test_a_forward_that_takes_no_other_arguments(caplog):
    model = tiny_model(attn_implementation="eager")
    model.forward = lambda input_ids, labels: model.base_model(input_ids).last_hidden_state
    assert torch.equal(model(IDS, labels=scored(IDS)), plain_twin(model).base_model(IDS).last_hidden_state)
    (message,) = warnings_of(caplog)
    assert "called by itself" in message
