"""One step of adaptation: what it costs, against what, and what is not computed."""

import copy

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as kl_of

from semtoken_hf.training.auxiliary_tasks import reconstruction_loss, state_matching_loss
from semtoken_hf.training.distillation import DistillationModel, kl_divergence, kl_divergence_by_row
from semtoken_hf.training.trainable_parts import choose_trainable
from tests.fixtures.tiny import random_ids, tiny_model

CONTEXT, TARGET = 48, 8
STEP = {"target_length": TARGET, "target_ratio": 3.0, "compression": True}


def by_distributions(student, teacher):
    return kl_of(Categorical(logits=teacher.float()), Categorical(logits=student.float())).mean()


def distillation(trainable="merger", cross_entropy_weight=0.0, has_tasks=False, **fields):
    student = tiny_model(merge_mode="learned", merger_rank=4, **fields)
    teacher = copy.deepcopy(student).requires_grad_(False).eval() if trainable == "full" else None
    choose_trainable(student, trainable, 2, 4)
    return DistillationModel(student, teacher, cross_entropy_weight, has_tasks).train()


@pytest.fixture
def ids():
    return random_ids(2, CONTEXT + TARGET)


@pytest.mark.parametrize(
    ("divergence", "dtype"), [(kl_divergence, torch.float32), (kl_divergence_by_row, torch.bfloat16)]
)
def test_kl(divergence, dtype):
    student, teacher = (torch.randn(3, 5, 7).to(dtype) * 4 for _ in range(2))
    ours = divergence(student, teacher)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, by_distributions(student, teacher), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, divergence(teacher, student), rtol=1e-2)
    torch.testing.assert_close(divergence(teacher, teacher), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_step_by_hand(ids, trainable):
    """The student reads the context at the ratio, the teacher reads all of it; both predict the targets."""
    module = distillation(trainable, cross_entropy_weight=0.5)
    teacher = tiny_model(merge_mode="learned", merger_rank=4)
    losses = module(ids, **STEP)
    whole = teacher(ids, compression=False).logits[:, CONTEXT - 1 : -1]
    read = teacher(ids, target_ratio=3.0, logits_to_keep=TARGET + 1)
    assert (read.compressed_lengths < CONTEXT).all()
    targets = ids[:, CONTEXT:]
    kl = by_distributions(read.logits[:, :-1], whole)
    cross_entropy = -Categorical(logits=read.logits[:, :-1]).log_prob(targets).mean()
    assert kl > 0.01
    torch.testing.assert_close(losses["kl"], kl.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], kl + 0.5 * cross_entropy, rtol=1e-4, atol=1e-5)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_the_student_is_its_own_teacher(ids):
    """What is trained does not change what the uncompressed student says."""
    module = distillation("lora")
    before = module.student(ids, compression=False).logits.detach()
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    assert module.teacher is module.student
    assert torch.equal(module.student(ids, compression=False).logits, before)
    assert len({p for _, p in module.named_parameters()}) == len(list(module.student.parameters()))


def test_a_full_student_has_a_teacher_of_its_own(ids):
    module = distillation("full")
    assert module.teacher is not module.student
    assert not module.teacher.training
    assert not any(name.startswith("_teacher") for name in module.state_dict())
    assert len(list(module.parameters())) == len(list(module.student.parameters()))
    uncompressed = {**STEP, "compression": False}
    assert module(ids, **uncompressed)["loss"].abs() < 1e-6
    before = module.teacher(ids, compression=False).logits
    with torch.no_grad():
        module.student.lm_head.weight.mul_(1.5)
    assert torch.equal(module.teacher(ids, compression=False).logits, before)
    losses = module(ids, **uncompressed)
    assert losses["loss"] > 0.01
    losses["loss"].backward()
    assert module.student.lm_head.weight.grad.any()
    assert module.teacher.lm_head.weight.grad is None


def test_tasks_by_hand(ids):
    module = distillation(has_tasks=True)
    losses = module(ids, **STEP, task_weight=0.25)
    student, head = module.student, module.head
    read = student(ids, target_ratio=3.0, logits_to_keep=TARGET + 1, output_hidden_states=True)
    whole = student(ids, compression=False, output_hidden_states=True)
    prompt = student.compress(
        ids, target_ratio=3.0, read_mask=torch.arange(CONTEXT + TARGET).expand(2, -1) >= CONTEXT - 1
    )
    columns = prompt.span_ids + prompt.inputs_embeds.shape[1] - prompt.kept_lengths[:, None]
    reconstruction = reconstruction_loss(head, prompt.inputs_embeds, columns, ids, student.lm_head.weight)
    matching = state_matching_loss(read.hidden_states[-1], whole.hidden_states[-1], columns)
    assert matching > 0
    torch.testing.assert_close(losses["reconstruction"], reconstruction.detach())
    torch.testing.assert_close(losses["state_matching"], matching.detach())
    torch.testing.assert_close(losses["loss"], losses["kl"] + 0.25 * (reconstruction + matching))
    losses["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())


def watch(module):
    """How the student is called, and how often the head is."""
    calls, heads = [], []
    module.student.register_forward_pre_hook(lambda m, a, k: calls.append(k) or None, with_kwargs=True)
    module.head.register_forward_hook(lambda *_: heads.append(1) and None)
    return calls, heads


@pytest.mark.parametrize(
    ("arguments", "computed"),
    [
        ({"task_weight": 0.25}, True),
        ({"task_weight": 0.0}, False),
        ({"task_weight": 0.25, "compression": False}, False),
    ],
)
def test_dropped_tasks_are_not_computed(ids, arguments, computed):
    module = distillation(has_tasks=True)
    calls, heads = watch(module)
    losses = module(ids, **{**STEP, **arguments})
    assert len(calls) == 2
    assert all(bool(call["output_hidden_states"]) == computed for call in calls)
    assert bool(heads) == computed
    assert ("reconstruction" in losses) == ("state_matching" in losses) == computed
    if not computed:
        assert torch.equal(losses["loss"], losses["kl"])


def test_a_batch_in_which_nothing_merges_teaches_nothing_and_breaks_nothing(ids):
    """A ratio near one, or a context that is too short: a run must not die of such a batch."""
    module = distillation("lora")
    loss = module(ids, **{**STEP, "target_ratio": 1.0})["loss"]
    loss.backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
