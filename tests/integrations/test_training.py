"""Training as users do it: plain loops, `Trainer`, collators, checkpoints; the context is compressed all the while.

What labels protect, and which logits they leave unread: `test_law2_read_positions.py`. Freezing: `test_fallbacks.py`.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from semtoken_hf import SemTokenLlamaForCausalLM
from tests.fixtures.children import ROOT
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import BERT, left_padded, plain_twin, random_ids, tiny_model, tiny_tokenizer

TRANSFORMER = {"encoder_config": dict(BERT), "encoder_window": 48}
LEARNED = {"merge_mode": "learned", "merger_rank": 4}
TOKENS, SCORED = 96, 12


def make_model(**fields):
    """In training mode; a merger is one that has learned something."""
    model = tiny_model(**fields).train()
    if model.model.learned_merger is not None:
        torch.nn.init.normal_(model.model.learned_merger.out_proj, generator=torch.Generator().manual_seed(1))
    return model


def batch(rows=4, seed=0):
    """Rows of which the last tokens are scored."""
    ids = random_ids(rows, TOKENS, seed)
    return {"input_ids": ids, "labels": ids.where(torch.arange(TOKENS) >= TOKENS - SCORED, -100)}


def gradients_of(model, **inputs):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, theirs, **tolerance):
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None) == ("semantic_encoder" in name), name
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["mean", "representative", "learned"])
def test_which_tokens_of_a_span_get_a_gradient(mode):
    """All of a mean, the representative alone without one, and all again through the learned residual."""
    model = make_model(merge_mode=mode, segmentation_mode="greedy")
    # Every id once, so that each row of the embedding belongs to one token.
    ids = 3 + torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[None]
    outputs = model(ids, labels=ids.where(torch.arange(TOKENS) >= TOKENS - SCORED, -100))
    outputs.loss.backward()
    has_gradient = (model.get_input_embeddings().weight.grad[ids[0]] != 0).any(1)
    spans = [(outputs.span_ids[0] == slot).nonzero()[:, 0] for slot in range(outputs.compressed_lengths[0])]
    assert max(len(span) for span in spans) > 2
    for span in spans[:-1]:
        assert has_gradient[span].sum() == (1 if mode == "representative" else len(span))
    # The last token predicts nothing.
    assert not has_gradient[-1]


@pytest.mark.filterwarnings("ignore:.*reentrant")
@pytest.mark.parametrize(
    ("fields", "use_reentrant"),
    [({}, False), ({**LEARNED, **TRANSFORMER}, True)],
    ids=["static", "transformer, learned"],
)
def test_gradient_checkpointing_changes_no_gradient(fields, use_reentrant):
    model = make_model(**fields)
    expected = gradients_of(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    ours = gradients_of(model, **batch())
    # Once more for the backward pass.
    assert len(calls) == 2
    torch.testing.assert_close(ours[0], expected[0])
    assert_same_gradients(ours[1], expected[1])


def test_padding_on_either_side_trains_alike():
    """Collators pad on the right."""
    model = tiny_model().train()
    rows = [random_ids(1, n, seed=n)[0] for n in (TOKENS, 70)]
    ids, mask = left_padded(rows)
    right_ids, right_mask = (part.flip(1) for part in left_padded([row.flip(0) for row in rows]))
    results = []
    for i, m in ((ids, mask), (right_ids, right_mask)):
        place = m.flip(1).cumsum(1).flip(1)
        labels = i.where((place <= SCORED) & (m == 1), -100)
        results.append(gradients_of(model, input_ids=i, attention_mask=m, labels=labels))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_a_collator_that_labels_everything_trains_llama_itself(caplog):
    model, tokenizer = tiny_model(attn_implementation="eager").train(), tiny_tokenizer()
    texts = ["the cat sat on the mat and the dog ran to the man " * n for n in (4, 3)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    inputs = dict(collator([tokenizer(text) for text in texts]))
    plain = plain_twin(model).train()
    (ours, gradients), (theirs, expected) = (gradients_of(twin, **inputs) for twin in (model, plain))
    assert model(**inputs).get("compressed_lengths") is None
    assert torch.equal(ours, theirs)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    (message,) = warnings_of(caplog)
    assert "all positions are scored: nothing can merge" in message


def trainer_of(model, folder, dataset, **arguments):
    defaults = {"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return Trainer(model, TrainingArguments(str(folder), **{**defaults, **arguments}), train_dataset=dataset)


def rows_of(*batches):
    return [{name: values[i] for name, values in b.items()} for b in batches for i in range(len(b["input_ids"]))]


def test_accumulated_batches_are_one_big_batch(tmp_path):
    """Rows with different numbers of labels, so that a mean of means would differ."""
    data = rows_of(batch(8))
    for i, row in enumerate(data):
        row["labels"] = row["input_ids"].where(torch.arange(TOKENS) >= TOKENS - 4 - 4 * (i % 4), -100)
    weights, model = [], tiny_model()
    for size in (4, 1):
        trainer = trainer_of(
            copy.deepcopy(model),
            tmp_path,
            data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=2,
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        weights.append(trainer.model.state_dict())
    initial = model.state_dict()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)
        assert torch.equal(tensor, initial[name]) == ("semantic_encoder" in name), name


def test_columns_for_our_arguments_reach_the_model(tmp_path):
    """`Trainer` drops columns that `forward` does not name."""
    model, seen = tiny_model(), []
    inputs = batch(2)
    model.eval()
    plan = model(**inputs, target_ratio=4.0).span_ids
    inputs |= {"span_ids": plan, "protected_mask": torch.arange(TOKENS).expand(2, -1) == 40}
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    model.register_forward_hook(lambda _, args, outputs: seen.append(outputs.span_ids))
    trainer_of(model, tmp_path, rows_of(inputs), per_device_train_batch_size=2, max_steps=1).train()
    assert {"span_ids", "protected_mask", "labels"} <= seen[0]
    # The order of the rows is the sampler's.
    assert (seen[1].amax(1) - plan.amax(1)).ge(0).all()
    assert seen[1].amax().item() < TOKENS // 2


@pytest.mark.parametrize("arguments", [{"label_smoothing_factor": 0.1}, {}], ids=["smoothing", "own loss"])
def test_a_loss_outside_the_model_reads_every_logit(tmp_path, arguments, caplog):
    """`Trainer` keeps the labels back, so nothing merges: exactly Llama, with one warning, and no NaN in the loss."""
    own = {} if arguments else {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean()}
    model = tiny_model(attn_implementation="eager")
    losses = []
    for twin in (model, plain_twin(model)):
        trainer = trainer_of(twin, tmp_path, rows_of(batch(2)), max_steps=1, **arguments)
        trainer.compute_loss_func = own.get("compute_loss_func")
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])
    (message,) = warnings_of(caplog)
    assert "neither `labels` nor `logits_to_keep`" in message


def test_a_run_that_is_resumed_and_saved(tmp_path):
    """Four steps, or two and two more: the same weights; the folder loads again with its code."""
    data = rows_of(*(batch(2, seed) for seed in range(4)))
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    model = tiny_model(**LEARNED, **TRANSFORMER)
    trainer = trainer_of(copy.deepcopy(model), tmp_path / "once", data, optim="adamw_torch", **options)
    trainer.train()
    expected = trainer.model.state_dict()
    resumed = trainer_of(copy.deepcopy(model), tmp_path / "twice", data, optim="adamw_torch", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    resumed.save_model(str(tmp_path / "model"))
    loaded = SemTokenLlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    ours, theirs = (m.eval()(**batch()) for m in (loaded, resumed.model))
    assert torch.equal(ours.span_ids, theirs.span_ids)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert not any(p.requires_grad for p in loaded.model.semantic_encoder.parameters())
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_semtoken_llama.SemTokenLlamaForCausalLM"
    assert all((tmp_path / "model" / f"{target.split('.')[0]}.py").is_file() for target in auto_map.values())


CONTEXT, TARGET, DOCUMENTS = 88, 4, 10


def documents():
    """Ten pieces of a chapter, with a few words that are always the same between each context and its target.

    Nothing that stays whole in front of the target tells the documents apart: who cannot read the compressed context
    has to guess among ten, which costs ln 10 nats a document.
    """
    chapter = (ROOT / Path("scripts/quickstart_chapter.txt")).read_text(encoding="utf-8").split("CHAPTER 7\n")[1]
    encode = {"add_special_tokens": False, "return_tensors": "pt"}
    tokens, bridge = (tiny_tokenizer()(text, **encode)["input_ids"][0] for text in (chapter, " the cat sat"))
    starts = torch.arange(DOCUMENTS) * (len(tokens) // DOCUMENTS)
    pieces = torch.stack([tokens[start : start + CONTEXT + TARGET] for start in starts])
    opened = torch.ones(DOCUMENTS, 1, dtype=torch.long)
    return opened, pieces[:, :CONTEXT], bridge.expand(DOCUMENTS, -1), pieces[:, CONTEXT:]


def test_ten_documents_are_learned_through_their_compressed_contexts(tmp_path):
    opened, contexts, bridge, targets = documents()
    assert len({tuple(row) for row in targets.tolist()}) == DOCUMENTS
    labels = torch.cat([torch.full((DOCUMENTS, 1 + CONTEXT + bridge.shape[1]), -100), targets], 1)

    def rows(order):
        return {"input_ids": torch.cat([opened, contexts[order], bridge, targets], 1), "labels": labels}

    own, others = torch.arange(DOCUMENTS), torch.arange(DOCUMENTS).roll(1)
    # Equal spans, so that neither a token that stays whole nor the layout of the slots gives a document away.
    fields = {"num_sink_tokens": 1, "recent_window": bridge.shape[1], "segmentation_mode": "uniform"}
    model = tiny_model(**fields, initializer_range=0.05, target_ratio=3.0)
    untrained = model(**rows(own)).loss.item()
    options = {"learning_rate": 3e-3, "optim": "adamw_torch", "per_device_train_batch_size": DOCUMENTS}
    options |= {"max_steps": 80, "logging_steps": 80}
    trained, shuffled = copy.deepcopy(model), copy.deepcopy(model)
    trainer_of(trained, tmp_path, rows_of(rows(own)), **options).train()
    generator = torch.Generator().manual_seed(0)
    mixed = [rows(torch.randperm(DOCUMENTS, generator=generator)) for _ in range(40)]
    trainer_of(shuffled, tmp_path, rows_of(*mixed), **options).train()

    outputs = trained.eval()(**rows(own))
    plan = outputs.span_ids
    assert (plan == plan[0]).all()
    # Every token of the context shares its slot.
    assert (plan[0, 1 : 1 + CONTEXT].bincount()[1:] > 1).all()
    guess = math.log(DOCUMENTS) / TARGET
    assert outputs.loss < 0.1 < guess
    assert untrained > 4
    # With the contexts of others, or trained on them, nobody is better than a guess.
    assert trained(**rows(others)).loss > 2
    assert shuffled.eval()(**rows(own)).loss > 0.9 * guess
