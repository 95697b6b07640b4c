"""The learned residual of merged slots: nothing before adaptation, and what its formula says after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from semtoken_hf.span_clustering import Spans
from semtoken_hf.span_merging import EPSILON, PARTS, READ_TOKENS, LearnedMerger, merge_spans
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


def trained_merger(rank: int = 3) -> LearnedMerger:
    """A merger whose every parameter is random."""
    merger = LearnedMerger(tiny_config(hidden_size=WIDTH, num_attention_heads=2, merger_rank=rank))
    for parameter in merger.parameters():
        torch.nn.init.normal_(parameter)
    return merger


def fingerprints_of(tokens: int) -> Tensor:
    return F.normalize(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(5)), dim=-1)


def unit_rms(values: Tensor) -> Tensor:
    return values / (values.square().mean() + EPSILON**2).sqrt()


def by_loop(
    merger: LearnedMerger, embeddings: Tensor, fingerprints: Tensor, slots: Tensor, lengths: Tensor = LENGTHS
) -> Tensor:
    """Slots with their residual, span by span and token by token, in double precision."""
    weights = {name: p.double() for name, p in merger.named_parameters()}
    rows, start = [], 0
    for n, slot in zip(lengths.tolist(), slots.double(), strict=True):
        tokens, states = embeddings[start : start + n].double(), fingerprints[start : start + n].double()
        start += n
        if n == 1:
            rows.append(slot)
            continue
        read = torch.stack([tokens[place * n // READ_TOKENS] for place in range(READ_TOKENS)])
        parts = torch.cat([part.mean(0) for part in read.chunk(PARTS)])
        hidden = weights["in_proj"] @ unit_rms(parts) + weights["state_proj"] @ unit_rms(states.mean(0))
        # 2, 3-4, 5-8, 9-16, and all that are longer.
        bucket = min((n - 1).bit_length() - 1, 4)
        residual = weights["out_proj"] @ F.gelu(hidden) + weights["length_vectors"][bucket]
        rows.append(slot + (read.square().mean() + EPSILON**2).sqrt() * residual)
    return torch.stack(rows)


def merged(merger: LearnedMerger | None, tokens: Tensor, lengths: Tensor = LENGTHS, base: str = "mean") -> Tensor:
    """Slots of spans of these lengths."""
    states = fingerprints_of(len(tokens))
    return merge_spans(tokens.__getitem__, spans(lengths), base, states, merger)[0]


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([2, 16, 17, 1, 32, 33, 100])])
@pytest.mark.parametrize("base", BASES)
def test_residual_against_a_loop(base: str, lengths: Tensor) -> None:
    merger, embeddings = trained_merger(), torch.randn(int(lengths.sum()), WIDTH)
    bare, slots = merged(None, embeddings, lengths, base), merged(merger, embeddings, lengths, base)
    expected = by_loop(merger, embeddings, fingerprints_of(len(embeddings)), bare, lengths)
    torch.testing.assert_close(slots, expected.float(), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(slots, bare)[lengths > 1].all(1).any()
    assert torch.equal(slots[lengths == 1], bare[lengths == 1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unadapted_merger_is_its_base(base: str, dtype: torch.dtype) -> None:
    merger = LearnedMerger(tiny_config(hidden_size=WIDTH, num_attention_heads=2)).to(dtype)
    embeddings = torch.randn(TOKENS, WIDTH).to(dtype)
    slots = merged(merger, embeddings, base=base)
    assert slots.dtype == dtype
    assert torch.equal(slots, merged(None, embeddings, base=base))


def test_gradients_against_a_loop() -> None:
    """Of every parameter and of the embeddings, through the base, the directions and the scale."""
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    inputs = [embeddings, *merger.parameters()]
    weight = torch.randn(len(LENGTHS), WIDTH)
    ours = torch.autograd.grad((merged(merger, embeddings) * weight).sum(), inputs)
    looped = by_loop(merger, embeddings, fingerprints_of(TOKENS), merged(None, embeddings))
    theirs = torch.autograd.grad((looped * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_unadapted_merger_can_learn() -> None:
    merger = LearnedMerger(tiny_config(hidden_size=WIDTH, num_attention_heads=2))
    merged(merger, torch.randn(TOKENS, WIDTH)).square().sum().backward()
    assert merger.out_proj.grad.abs().sum() > 0
    assert merger.length_vectors.grad.abs().sum() > 0


def test_only_lone_tokens_change_no_bit_and_no_tokens_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semtoken_hf.span_merging.is_on_host", lambda tensor: False)
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH).bfloat16()
    alone, states = spans(torch.ones(TOKENS, dtype=torch.long)), fingerprints_of(TOKENS)
    # With a bound of 3, what stands for slots that are not there must change nothing.
    for most_merged in (None, 0, 3):
        slots, _ = merge_spans(embeddings.__getitem__, alone, "mean", states, merger, most_merged)
        assert torch.equal(slots, embeddings)
    nothing = Spans.from_starts(torch.zeros(0, dtype=torch.bool))
    slots, _ = merge_spans(embeddings[:0].__getitem__, nothing, "mean", states[:0], merger)
    assert slots.shape == (0, WIDTH)


def test_on_a_cpu_only_merged_slots_are_computed_whatever_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    merger, embeddings, computed = trained_merger(), torch.randn(TOKENS, WIDTH), []
    forward = merger.forward
    monkeypatch.setattr(merger, "forward", lambda tokens, *rest: computed.append(len(tokens)) or forward(tokens, *rest))
    merge_spans(embeddings.__getitem__, spans(), "mean", fingerprints_of(TOKENS), merger, len(LENGTHS))
    assert sum(computed) == (LENGTHS > 1).sum() < len(LENGTHS)


def test_a_merger_without_fingerprints_is_refused() -> None:
    with pytest.raises(ValueError, match="reads fingerprints"):
        merge_spans(torch.randn(TOKENS, WIDTH).__getitem__, spans(), "mean", None, trained_merger())


def test_a_bound_of_the_merged_slots_is_as_good_as_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    merger, embeddings, states = trained_merger(), torch.randn(TOKENS, WIDTH), fingerprints_of(TOKENS)
    exact = merged(merger, embeddings)
    monkeypatch.setattr("semtoken_hf.span_merging.is_on_host", lambda tensor: False)
    monkeypatch.setattr("semtoken_hf.span_merging.SLOTS_PER_CALL", 2)
    bounded, _ = merge_spans(embeddings.__getitem__, spans(), "mean", states, merger, len(LENGTHS))
    torch.testing.assert_close(bounded, exact)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    """The residual comes in the dtype of the stream and is as exact as that allows."""
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        slots = merged(merger, embeddings)
    expected = by_loop(merger, embeddings, fingerprints_of(TOKENS), merged(None, embeddings))
    assert slots.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (slots.double() - expected).abs().max() < 3e-2 * scale
    assert torch.equal(slots[LENGTHS == 1], embeddings[FIRST[LENGTHS == 1]])


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_the_residual_grows_with_the_embeddings(scale: float) -> None:
    merger, embeddings = trained_merger(), torch.randn(TOKENS, WIDTH)
    scaled = merged(merger, embeddings * scale) / scale
    torch.testing.assert_close(scaled, merged(merger, embeddings), rtol=1e-4, atol=1e-4)


def test_zero_embeddings_are_finite() -> None:
    merger, embeddings = trained_merger(), torch.zeros(TOKENS, WIDTH, requires_grad=True)
    slots = merged(merger, embeddings)
    slots.sum().backward()
    assert slots.isfinite().all()
    assert embeddings.grad.isfinite().all()


def test_a_short_span_looks_at_no_neighbour() -> None:
    merger, tokens = trained_merger(), torch.randn(6, WIDTH)
    pairs = torch.tensor([2, 2, 2])
    changed = tokens.clone()
    changed[[0, 1, 4, 5]] = 100.0
    torch.testing.assert_close(merged(merger, tokens, pairs)[1], merged(merger, changed, pairs)[1])


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
    fields = {"merge_mode": "learned", "merger_base": "mean", "merger_rank": 5}
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


def test_a_merger_of_an_earlier_kind_says_so(tmp_path) -> None:
    model = tiny_model(merge_mode="learned", merger_rank=4)
    merger = model.model.learned_merger
    merger.place_mix = merger.length_vectors
    del merger.length_vectors, merger.state_proj
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="learned merger is of an earlier kind"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, merge_mode="mean").model.learned_merger is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"merge_mode": "residual"}, "merge_mode"),
        ({"merger_base": "learned"}, "merger_base"),
        ({"merger_base": None}, "merger_base"),
        ({"merger_rank": 0}, "merger_rank"),
        ({"adapter_subfolder": ""}, "adapter_subfolder"),
        ({"adapter_subfolder": "../adapter"}, "adapter_subfolder"),
        ({"adapter_subfolder": "a/b"}, "adapter_subfolder"),
    ],
)
def test_nonsense_is_refused_by_name(fields: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_config(**fields)


def test_fields_of_the_wrong_type_are_refused() -> None:
    for fields in ({"merger_rank": 2.5}, {"adapted_for": "compact"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(fields))):
            tiny_config(**fields)
