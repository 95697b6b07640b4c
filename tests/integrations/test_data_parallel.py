"""Data parallel on two processes, replicated (DDP) and sharded (FSDP2): the gradients of one process."""

import pytest
import torch

from semtoken_hf import SemTokenLlamaForCausalLM
from tests.fixtures.children import run_ranks
from tests.fixtures.tiny import BERT, tiny_model
from tests.integrations.parallel_child import __name__ as child
from tests.integrations.parallel_child import gradients, prompts, training_rows

FIELDS = {"merge_mode": "learned", "merger_rank": 4, "encoder_config": dict(BERT), "encoder_window": 48}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder, and what each rank found."""
    folder = tmp_path_factory.mktemp("data_parallel")
    model = tiny_model(**FIELDS)
    torch.nn.init.normal_(model.model.learned_merger.out_proj, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "plain" / "learned")
    return folder, run_ranks(child, folder, "data_parallel", "fully_sharded")


def load(ranks, **arguments):
    return SemTokenLlamaForCausalLM.from_pretrained(ranks[0] / "plain" / "learned", **arguments)


def assert_gradients(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None) == ("semantic_encoder" in name), name
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_replicas_have_the_gradients_of_the_whole_batch(ranks):
    """Step after step, without `find_unused_parameters`: the frozen encoder is no unused parameter."""
    model = load(ranks).train()
    ids, labels = training_rows()
    model(ids, labels=labels).loss.backward()
    for facts in ranks[1]:
        for step in facts["data_parallel"]["steps"][:2]:
            assert step["merged"]
            assert_gradients(step["gradients"], gradients(model), **CLOSE)


def test_a_replica_with_nothing_to_merge(ranks):
    """Its merger is an unused parameter, which DDP wants to be told about."""
    model = load(ranks).train()
    ids, labels = training_rows()
    (model(ids[:2], labels=labels[:2]).loss / 2).backward()
    (model(ids[2:], labels=ids[2:]).loss / 2).backward()
    for rank, facts in enumerate(ranks[1]):
        for step in facts["data_parallel"]["steps"][2:]:
            assert step["merged"] == (rank == 0)
            assert_gradients(step["gradients"], gradients(model), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharding", ["torch", "transformers"])
def test_shards_read_and_train_as_one_process_does(ranks, sharding, dtype):
    model = load(ranks, dtype=dtype).eval()
    ids, mask = prompts()
    expected = model(ids, attention_mask=mask, logits_to_keep=2)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    rows, labels = training_rows()
    model.train()(rows, labels=labels).loss.backward()
    tolerance = CLOSE if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for facts in (rank["fully_sharded"][f"{sharding}, {dtype}"] for rank in ranks[1]):
        assert torch.equal(facts["plan"], expected.span_ids)
        torch.testing.assert_close(facts["logits"], expected.logits, **tolerance)
        assert torch.equal(facts["tokens"], tokens)
        assert_gradients(facts["gradients"], gradients(model), **tolerance)
