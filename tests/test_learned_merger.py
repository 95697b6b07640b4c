"""The learned residual of merged slots: nothing before adaptation, and what its formula says after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from semtoken_hf.learned_merger import EPSILON, LearnedMerger
from semtoken_hf.span_clustering import Spans
from semtoken_hf.span_merging import merge_spans
from tests.fixtures.tiny import ragged_prompts, tiny_config, tiny_model

LENGTHS = torch.tensor([1, 4, 2, 1, 1, 7, 3, 1, 2])
FIRST = LENGTHS.cumsum(0) - LENGTHS
TOKENS = int(LENGTHS.sum())
WIDTH = 8
BASES = ["mean", "representative"]


def spans(lengths: Tensor = LENGTHS) -> Spans:
    starts = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    starts[lengths.cumsum(0) - lengths] = True
    return Spans.from_starts(starts)


def trained_merger(span_length: int = 8, rank: int = 3) -> LearnedMerger:
    """A merger whose every parameter is random."""
    merger = LearnedMerger(
        tiny_config(hidden_size=WIDTH, num_attention_heads=2, merger_rank=rank, merger_span_length=span_length)
    )
    for parameter in merger.parameters():
        torch.nn.init.normal_(parameter)
    return merger


def by_loop(merger: LearnedMerger, embeddings: Tensor, slots: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    """Slots with their residual, span by span, mixture by mixture and token by token, in double precision."""
    weights = {name: p.double() for name, p in merger.named_parameters()}
    rows, start = [], 0
    for n, slot in zip(lengths.tolist(), slots.double(), strict=True):
        tokens = embeddings[start : start + n].double()
        start += n
        if n == 1:
            rows.append(slot)
            continue
        seen = min(n, len(weights["place_mix"]))
        mixtures = []
        for mix in weights["place_mix"][seen - 1]:
            mixtures.append(sum(mix[p] * tokens[p] for p in range(seen)))
        mixture = torch.cat(mixtures)
        rms = (mixture.square().mean() + EPSILON**2).sqrt()
        hidden = F.silu(weights["in_proj"] @ (mixture / rms) + weights["length_bias"][seen - 1])
        rows.append(slot + rms * (weights["out_proj"] @ hidden))
    return torch.stack(rows)


# 4: shorter than the longest span; 7: exactly that; 20: longer.
@pytest.mark.parametrize("span_length", [1, 4, 7, 20])
@pytest.mark.parametrize("base", BASES)
def test_residual_against_a_loop(base: str, span_length: int) -> None:
    merger, embeddings = trained_merger(span_length), torch.randn(TOKENS, WIDTH)
    bare, anchors = merge_spans(embeddings.__getitem__, spans(), base)
    slots, same_anchors = merge_spans(embeddings.__getitem__, spans(), base, merger=merger)
    assert torch.equal(anchors, same_anchors)
    torch.testing.assert_close(slots, by_loop(merger, embeddings, bare).float(), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(slots, bare)[LENGTHS > 1].all(1).any()
    assert torch.equal(slots[LENGTHS == 1], embeddings[FIRST[LENGTHS == 1]])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unadapted_merger_is_its_base(base: str, dtype: torch.dtype) -> None:
    merger = LearnedMerger(tiny_config(hidden_size=WIDTH, num_attention_heads=2))
    embeddings = torch.randn(TOKENS, WIDTH).to(dtype)
    bare, _ = merge_spans(embeddings.__getitem__, spans(), base)
    slots, _ = merge_spans(embeddings.__getitem__, spans(), base, merger=merger.to(dtype))
    assert slots.dtype == dtype
    assert torch.equal(slots, bare)


def test_gradients_against_a_loop() -> None:
    """Of every parameter and of the embeddings, through the base, the directions and the scale."""
    merger, embeddings = trained_merger(4), torch.randn(TOKENS, WIDTH, requires_grad=True)
    inputs = [embeddings, *merger.parameters()]
    weight = torch.randn(len(LENGTHS), WIDTH)
    slots, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger)
    ours = torch.autograd.grad((slots * weight).sum(), inputs)
    bare, _ = merge_spans(embeddings.__getitem__, spans(), "mean")
    theirs = torch.autograd.grad((by_loop(merger, embeddings, bare) * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_unadapted_merger_can_learn() -> None:
    merger = LearnedMerger(tiny_config(hidden_size=WIDTH, num_attention_heads=2))
    slots, _ = merge_spans(torch.randn(TOKENS, WIDTH).__getitem__, spans(), "mean", merger=merger)
    slots.square().sum().backward()
    assert merger.out_proj.grad.abs().sum() > 0


def test_only_lone_tokens_change_no_bit_and_no_tokens_are_none() -> None:
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH).bfloat16()
    alone = spans(torch.ones(TOKENS, dtype=torch.long))
    # With a bound of 3, what stands for slots that are not there must change nothing.
    for most_merged in (None, 0, 3):
        slots, _ = merge_spans(embeddings.__getitem__, alone, "mean", merger=merger, most_merged=most_merged)
        assert torch.equal(slots, embeddings)
    nothing = Spans.from_starts(torch.zeros(0, dtype=torch.bool))
    slots, _ = merge_spans(embeddings[:0].__getitem__, nothing, "mean", merger=merger)
    assert slots.shape == (0, WIDTH)


def test_a_bound_of_the_merged_slots_is_as_good_as_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH)
    exact, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger)
    monkeypatch.setattr("semtoken_hf.span_merging.SLOTS_PER_CALL", 2)
    bounded, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger, most_merged=len(LENGTHS))
    torch.testing.assert_close(bounded, exact)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    """The residual comes in the dtype of the stream and is as exact as that allows."""
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH).bfloat16()
    bare, _ = merge_spans(embeddings.__getitem__, spans(), "mean")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        slots, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger)
    expected = by_loop(merger, embeddings, bare)
    assert slots.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (slots.double() - expected).abs().max() < 3e-2 * scale
    assert torch.equal(slots[LENGTHS == 1], embeddings[FIRST[LENGTHS == 1]])


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_the_residual_grows_with_the_embeddings(scale: float) -> None:
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH)
    once, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger)
    scaled, _ = merge_spans((embeddings * scale).__getitem__, spans(), "mean", merger=merger)
    torch.testing.assert_close(scaled / scale, once, rtol=1e-4, atol=1e-4)


def test_zero_embeddings_are_finite() -> None:
    merger, embeddings = trained_merger(), torch.zeros(TOKENS, WIDTH, requires_grad=True)
    slots, _ = merge_spans(embeddings.__getitem__, spans(), "mean", merger=merger)
    slots.sum().backward()
    assert slots.isfinite().all()
    assert embeddings.grad.isfinite().all()


def residual(merger: LearnedMerger, tokens: Tensor) -> Tensor:
    """Of one span of all the tokens."""
    return residuals(merger, tokens, torch.tensor([len(tokens)]))[0]


def residuals(merger: LearnedMerger, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Of spans of these lengths."""
    bare, _ = merge_spans(tokens.__getitem__, spans(lengths), "mean")
    slots, _ = merge_spans(tokens.__getitem__, spans(lengths), "mean", merger=merger)
    return slots - bare


def test_place_matters() -> None:
    merger, tokens = trained_merger(), torch.randn(3, WIDTH)
    assert not torch.allclose(residual(merger, tokens), residual(merger, tokens.flip(0)))
    # Mixtures that weigh all places alike know none.
    torch.nn.init.ones_(merger.place_mix)
    torch.testing.assert_close(residual(merger, tokens), residual(merger, tokens.flip(0)), rtol=1e-4, atol=1e-4)


def test_length_matters_up_to_the_longest_known() -> None:
    merger, token = trained_merger(span_length=4), torch.randn(1, WIDTH)
    # Mixtures of the first token alone: what is left to differ is the bias of the length.
    torch.nn.init.zeros_(merger.place_mix)
    with torch.no_grad():
        merger.place_mix[..., 0] = 1
    by_length = {n: residual(merger, token.repeat(n, 1)) for n in (2, 3, 4, 6)}
    assert not torch.allclose(by_length[2], by_length[3])
    assert not torch.allclose(by_length[3], by_length[4])
    torch.testing.assert_close(by_length[4], by_length[6])


def test_a_short_span_looks_at_no_neighbour() -> None:
    merger, tokens = trained_merger(), torch.randn(6, WIDTH)
    pairs = torch.tensor([2, 2, 2])
    changed = tokens.clone()
    changed[[0, 1, 4, 5]] = 100.0
    torch.testing.assert_close(residuals(merger, tokens, pairs)[1], residuals(merger, changed, pairs)[1])


@pytest.fixture(scope="module", params=BASES)
def unadapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model that merges by a base, and the same checkpoint loaded with a merger on that base."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(merge_mode=request.param)
    model.save_pretrained(folder)
    return model, AutoModelForCausalLM.from_pretrained(folder, merge_mode="learned", merger_base=request.param)


def test_an_unadapted_checkpoint_reads_and_writes_as_before(unadapted) -> None:
    before, learned = unadapted
    ids, mask = ragged_prompts()
    assert before.model.learned_merger is None
    assert not learned.model.learned_merger.out_proj.any()
    assert learned.model.learned_merger.in_proj.std() > 0
    prompt, other = (model.compress(ids, mask) for model in unadapted)
    assert prompt.is_merged
    assert torch.equal(prompt.inputs_embeds, other.inputs_embeds)
    assert torch.equal(prompt.position_ids, other.position_ids)
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (model.generate(ids, **arguments) for model in unadapted)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_compress_adds_the_residual_to_merged_slots_alone(unadapted) -> None:
    before, learned = unadapted
    ids, mask = ragged_prompts()
    merger = learned.model.learned_merger
    bare = before.compress(ids, mask)
    with torch.no_grad():
        merger.out_proj.normal_()
        prompt = learned.compress(ids, mask)
        merger.out_proj.zero_()
    changed = (prompt.inputs_embeds != bare.inputs_embeds).any(-1)
    assert torch.equal(changed, bare.slot_lengths > 1)
    assert torch.equal(prompt.position_ids, bare.position_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype: torch.dtype) -> None:
    fields = {"merge_mode": "learned", "merger_base": "mean", "merger_rank": 5, "merger_span_length": 6}
    model, (ids, mask) = tiny_model(dtype=dtype, **fields), ragged_prompts()
    torch.nn.init.normal_(model.model.learned_merger.out_proj)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in fields} == fields
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert torch.equal(loaded.compress(ids, mask).inputs_embeds, model.compress(ids, mask).inputs_embeds)


@pytest.mark.parametrize("longest", [3, 16])
def test_another_span_cap_keeps_the_merger(tmp_path, longest: int) -> None:
    model, (ids, mask) = tiny_model(merge_mode="learned", max_span_length=6), ragged_prompts()
    torch.nn.init.normal_(model.model.learned_merger.out_proj)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, max_span_length=longest, target_ratio=8.0)
    assert (loaded.config.max_span_length, loaded.config.merger_span_length) == (longest, 6)
    for name, tensor in model.model.learned_merger.state_dict().items():
        assert torch.equal(loaded.model.learned_merger.state_dict()[name], tensor)
    prompt = loaded.compress(ids, mask)
    # One spans the merger's own cap: it is read as the longest that it knows.
    assert (prompt.slot_lengths.max() > 6) == (longest > 6)
    assert prompt.inputs_embeds.isfinite().all()


def test_the_merger_knows_spans_up_to_the_cap_by_default() -> None:
    assert tiny_config(max_span_length=12).merger_span_length == 12
    assert tiny_config(max_span_length=12, merger_span_length=5).merger_span_length == 5
    assert tiny_model(merge_mode="learned", max_span_length=3).model.learned_merger.length_bias.shape == (3, 128)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"merge_mode": "residual"}, "merge_mode"),
        ({"merger_base": "learned"}, "merger_base"),
        ({"merger_base": None}, "merger_base"),
        ({"merger_rank": 0}, "merger_rank"),
        ({"merger_span_length": 0}, "merger_span_length"),
        ({"adapter_subfolder": ""}, "adapter_subfolder"),
        ({"adapter_subfolder": "../adapter"}, "adapter_subfolder"),
        ({"adapter_subfolder": "a/b"}, "adapter_subfolder"),
    ],
)
def test_nonsense_is_refused_by_name(fields: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_config(**fields)


def test_fields_of_the_wrong_type_are_refused() -> None:
    for fields in ({"merger_rank": 2.5}, {"adapted_for": "compact"}, {"merger_span_length": True}):
        with pytest.raises((ValueError, TypeError), match=next(iter(fields))):
            tiny_config(**fields)
