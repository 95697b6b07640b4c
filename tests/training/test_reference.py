import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from semtoken_hf.training.reference import ReferenceConfig, ReferenceTrainer, learning_rate_factor
from tests.fixtures.text import PROSE


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    for part in range(2):
        documents = [PROSE.replace("Bennet", f"Bennet{part}{i}") for i in range(40)]
        (tmp_path / "text" / f"{part}.txt").write_text("\n\n\n".join(documents))
    return ReferenceConfig(
        text_folder=str(tmp_path / "text"),
        output_dir=str(tmp_path / "run"),
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        sequence_length=16,
        long_sequence_length=32,
        tokens_per_step=128,
        tokens_per_micro_batch=64,
        steps=12,
        warmup_steps=2,
        decay_steps=4,
        held_out_share=0.2,
        mixed_precision="no",
        checkpoint_every=3,
        evaluate_every=6,
        evaluation_blocks=1,
    )


def weights(trainer):
    return {k: v.clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def test_a_run_learns_and_leaves_a_plain_llama(config):
    folder = ReferenceTrainer(config).train()
    records = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert set(records[-1]["held_out"]) == {"0.txt", "1.txt"}
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0, 1:]) == PROSE
    assert model(ids[:, :32]).logits.isfinite().all()


def test_a_killed_run_resumes_to_the_same_weights(config, tmp_path):
    whole = ReferenceTrainer(config)
    whole.train()
    broken = ReferenceTrainer(replace(config, output_dir=str(tmp_path / "broken")))
    while broken.step < 7:  # dies after the checkpoint of step 6
        broken.train_step()
        if broken.step % 3 == 0:
            broken.save_checkpoint()
    resumed = ReferenceTrainer(broken.config)
    assert resumed.step == 6
    resumed.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=1e-4, atol=1e-5)


def test_resuming_checks_the_configuration(config):
    trainer = ReferenceTrainer(config)
    for _ in range(10):
        trainer.train_step()
    trainer.save_checkpoint()
    with pytest.raises(ValueError, match="learning_rate"):
        ReferenceTrainer(replace(config, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"already decaying.*cycle_start=10"):
        ReferenceTrainer(replace(config, steps=20))


def test_a_finished_run_is_trained_on_by_a_new_cycle(config):
    ReferenceTrainer(config).train()
    longer = replace(config, steps=20, cycle_start=12)
    factors = [learning_rate_factor(step, longer) for step in range(12, 20)]
    assert factors == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    trainer = ReferenceTrainer(longer)
    assert trainer.step == 12
    trainer.train()
    assert trainer.step == 20
    with pytest.raises(ValueError, match="cycle_start"):
        replace(config, steps=17, cycle_start=12)


@pytest.mark.parametrize("fields", [{"tokens_per_step": 100}, {"weights": ["0.txt"]}])
def test_nonsense_is_refused(config, fields):
    with pytest.raises(ValueError, match=next(iter(fields)).split("_")[0]):
        replace(config, **fields)
