"""Stage 1: windows, running mean, and that the encoder is frozen, fp32 and blind to neighbours."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig

from semtoken_hf import semantic_encoder
from semtoken_hf.semantic_encoder import SemanticEncoder
from semtoken_hf.token_layout import TokenLayout
from tests.fixtures.layouts import trimmed_layout
from tests.fixtures.tiny import VOCAB_SIZE, random_ids, tiny_config, tiny_model

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = {"static": None, "transformer": BERT}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def make_encoder(kind: str, **fields: Any) -> SemanticEncoder:
    torch.manual_seed(0)
    windows = {"encoder_window": 16, "encoder_overlap": 4}
    return SemanticEncoder(tiny_config(encoder_config=KINDS[kind], **{**windows, **fields}))


def segments_of(*lengths: int, min_length: int = 0) -> TokenLayout:
    """A layout with one segment of each length, all of it free to merge from `min_length` on."""
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    nothing = torch.zeros_like(valid)
    return trimmed_layout(valid, nothing, nothing, 0, 0, min_length)


class WindowSpy(nn.Module):
    """An encoder whose state says where it was computed; its token ids are places in the stream."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=3, _attn_implementation=attention)
        self.windows: list[list[int]] = []
        self.masks: list[Tensor | None] = []

    def get_input_embeddings(self) -> Any:
        return lambda ids: ids[..., None].float()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None) -> SimpleNamespace:
        input_ids = inputs_embeds[..., 0].long()
        self.masks.append(attention_mask)
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            valid = attention_mask[:, 0, 0] == 0 if attention_mask.ndim == 4 else attention_mask.bool()
        self.windows += [ids[mask].tolist() for ids, mask in zip(input_ids, valid, strict=True)]
        start = input_ids[:, :1].expand_as(input_ids)
        column = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack([start, column, torch.ones_like(start)], -1).float())


def spied_encoder(attention: str = "sdpa", **fields: Any) -> tuple[SemanticEncoder, WindowSpy]:
    encoder = make_encoder("transformer", **fields)
    encoder.encoder, encoder.width = WindowSpy(attention), 3
    return encoder, encoder.encoder


def spy_on(layout: TokenLayout, window: int, overlap: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """The windows, and for every token the first token of its window and its column there."""
    encoder, spy = spied_encoder(encoder_window=window, encoder_overlap=overlap, fingerprint_radius=0)
    start, column, scale = encoder(torch.arange(len(layout.segment)), layout).unbind(1)
    # Calls of one shape repeat the last window.
    windows = [list(tokens) for tokens in dict.fromkeys(map(tuple, spy.windows))]
    return windows, (start / scale).round().long(), (column / scale).round().long()


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 16), st.data())
@PROPERTY
def test_windows_cover_each_segment_and_never_cross_it(lengths: list[int], window: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    layout = segments_of(*lengths)
    windows, _, _ = spy_on(layout, window, overlap)
    covered = {s: [] for s in range(len(lengths))}
    for tokens in windows:
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        assert layout.segment[tokens[0]] == layout.segment[tokens[-1]]
        covered[int(layout.segment[tokens[0]])].append(tokens)
    for number, (length, start) in enumerate(zip(lengths, layout.starts.tolist(), strict=True)):
        mine = covered[number]
        assert (mine[0][0], mine[-1][-1]) == (start, start + length - 1)
        assert all(len(tokens) == min(window, length) for tokens in mine)
        assert all(b[0] <= a[-1] + 1 - overlap for a, b in pairwise(mine))
        assert len(mine) <= 1 + max(0, -(-(length - window) // (window - overlap)))


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 16), st.data())
@PROPERTY
def test_a_token_is_read_where_it_is_farthest_from_an_edge(lengths: list[int], window: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    layout = segments_of(*lengths)
    windows, starts, columns = spy_on(layout, window, overlap)
    assert (starts + columns).tolist() == list(range(len(layout.segment)))
    for token, start in enumerate(starts.tolist()):
        margins = {w[0]: min(token - w[0], w[-1] - token) for w in windows if w[0] <= token <= w[-1]}
        assert margins[start] == max(margins.values()), (token, margins, start)


def test_many_windows_are_encoded_in_several_calls(monkeypatch) -> None:
    encoder, layout, ids = make_encoder("transformer"), segments_of(50, 9, 70), random_ids(1, 129)[0]
    together = encoder(ids, layout)
    monkeypatch.setattr(semantic_encoder, "WINDOWS_PER_CALL", 2)
    assert torch.allclose(encoder(ids, layout), together, atol=1e-5)


def test_segments_where_nothing_may_merge_are_not_encoded() -> None:
    layout = segments_of(30, 5, 40, min_length=10)
    encoder = make_encoder("transformer")
    fingerprints = encoder(random_ids(1, 75)[0], layout)
    is_short = layout.segment == 1
    assert (fingerprints[is_short] == 0).all()
    assert torch.allclose(fingerprints[~is_short].norm(dim=1), torch.ones(70), atol=1e-5)
    encoder, spy = spied_encoder()
    encoder(torch.arange(75), layout)
    assert not {*range(30, 35)} & {token for tokens in spy.windows for token in tokens}


def test_nothing_to_encode() -> None:
    encoder = make_encoder("transformer")
    encoder.encoder.forward = None
    fingerprints = encoder(random_ids(1, 12)[0], segments_of(5, 7, min_length=10))
    assert torch.equal(fingerprints, torch.zeros(12, BERT["hidden_size"]))


@each_kind
@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_fingerprints_are_the_unit_mean_of_the_states_around(kind: str, radius: int) -> None:
    layout, ids = segments_of(16, 1, 2, 11, min_length=2), random_ids(1, 30)[0]
    encoder = make_encoder(kind, fingerprint_radius=radius)
    if kind == "static":
        states = encoder.encoder.embeddings(ids)
    else:
        # Every segment fits one window; one token alone has nothing to merge with.
        rows = [encoder.encoder(input_ids=part[None]).last_hidden_state[0] for part in ids.split([16, 1, 2, 11])]
        states = torch.cat([row * (len(row) > 1) for row in rows])
    expected = []
    for i, segment in enumerate(layout.segment.tolist()):
        around = [j for j in range(max(0, i - radius), min(30, i + radius + 1)) if layout.segment[j] == segment]
        expected.append(F.normalize(states[around].mean(0), dim=0))
    fingerprints = encoder(ids, layout)
    assert torch.allclose(fingerprints, torch.stack(expected), atol=1e-5)


@each_kind
def test_a_segment_does_not_see_its_neighbours(kind: str) -> None:
    encoder, ids = make_encoder(kind), random_ids(1, 50)[0]
    alone = encoder(ids, segments_of(50))
    for before, after in ((3, 20), (40, 1), (17, 64)):
        around = [random_ids(1, n, seed=n)[0] for n in (before, after)]
        layout = segments_of(before, 50, after)
        among = encoder(torch.cat([around[0], ids, around[1]]), layout)[layout.segment == 1]
        assert torch.equal(among, alone) if kind == "static" else torch.allclose(among, alone, atol=1e-5)


@each_kind
def test_frozen_and_without_gradient(kind: str) -> None:
    model = tiny_model(encoder_config=KINDS[kind], encoder_window=32).train()
    encoder = model.model.semantic_encoder
    assert model.training
    assert not any(module.training for module in encoder.modules())
    assert not encoder.train(True).training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_(True)
    layout, ids = segments_of(40), random_ids(1, 40)[0]
    fingerprints = encoder(ids, layout)
    assert not fingerprints.requires_grad
    # Dropout would make the second call differ.
    assert torch.equal(encoder(ids, layout), fingerprints)


@each_kind
def test_float32_inside_autocast(kind: str) -> None:
    encoder, layout, ids = make_encoder(kind), segments_of(40), random_ids(1, 40)[0]
    expected = encoder(ids, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fingerprints = encoder(ids, layout)
    assert fingerprints.dtype == torch.float32
    assert torch.equal(fingerprints, expected)


@each_kind
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 7, VOCAB_SIZE - 50])
def test_a_resized_vocabulary_gets_the_mean_state(kind: str, vocab_size: int) -> None:
    encoder = make_encoder(kind)
    old = encoder.encoder.get_input_embeddings().weight.clone()
    encoder.resize(vocab_size)
    new = encoder.encoder.get_input_embeddings().weight
    known = min(vocab_size, VOCAB_SIZE)
    assert torch.equal(new[:known], old[:known])
    assert torch.allclose(new[known:], old.mean(0).expand(vocab_size - known, -1), atol=1e-6)
    assert not new.requires_grad
    ids = torch.full((20,), vocab_size - 1)
    assert encoder(ids, segments_of(20)).shape == (20, old.shape[1])


# Darwin, "The Voyage of the Beagle" (1839), and Carroll, "Alice's Adventures in Wonderland" (1865).
ISLANDS = (
    "These islands at a distance have a sloping uniform outline, excepting where broken by sundry paps and hillocks. "
    "The whole is formed of black lava, completely covered by small leafless brushwood and low trees. The fragments "
    "of lava where most porous are reddish and like cinders; the stunted trees show little signs of life."
)
ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and "
    "what is the use of a book, thought Alice, without pictures or conversations?"
)


def test_the_real_minilm_tells_two_books_apart(minilm) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    encoder_config = BertConfig.from_pretrained(minilm)
    encoder = SemanticEncoder(
        tiny_config(encoder_config=encoder_config, vocab_size=encoder_config.vocab_size, encoder_window=48)
    )
    encoder.encoder.load_state_dict(plain.state_dict())
    texts = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in (ISLANDS, ALICE)]
    lengths = [text.shape[1] for text in texts]
    assert min(lengths) > 48
    fingerprints = encoder(torch.cat(texts, dim=1)[0], segments_of(*lengths))
    assert torch.allclose(fingerprints.norm(dim=1), torch.ones(sum(lengths)), atol=1e-5)

    with torch.no_grad():
        first = plain(input_ids=texts[0][:, :48]).last_hidden_state[0]
    assert torch.allclose(fingerprints[10], F.normalize(first[8:13].mean(0), dim=0), atol=1e-4)

    islands, alice = fingerprints.split(lengths)
    half = len(islands) // 2
    mean = [F.normalize(part.mean(0), dim=0) for part in (islands[:half], islands[half:], alice)]
    assert mean[0] @ mean[1] > 0.2 + torch.maximum(mean[0] @ mean[2], mean[1] @ mean[2])


@pytest.mark.parametrize("attention", ["eager", "paged|eager"])
def test_attention_of_the_language_model_is_not_the_encoders(attention):
    """A paged one reads a cache that the encoder does not have; others need half precision."""
    model = tiny_model(encoder_config=BERT, encoder_window=64, attn_implementation="sdpa")
    ids = random_ids(1, 96)
    plan = model.compress(ids).span_ids
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    assert model.model.semantic_encoder.encoder.config._attn_implementation == "sdpa"
    assert torch.equal(model.compress(ids).span_ids, plan)


def test_padding_leaves_the_windows_of_layers_as_they_are() -> None:
    """One ready mask for all layers would let local ones see everything, in every row of the call."""
    config = {"model_type": "modernbert", "num_hidden_layers": 4, "local_attention": 4, "global_attn_every_n_layers": 3}
    sizes = {name: BERT[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    windows = {"encoder_window": 16, "encoder_overlap": 4, "fingerprint_radius": 0}
    encoder = SemanticEncoder(tiny_config(encoder_config={**config, **sizes, **special}, **windows))
    assert encoder.encoder.config._attn_implementation == "sdpa"
    for parameter in encoder.encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = random_ids(1, 27)[0]
    fingerprints = encoder(ids, segments_of(11, 16))
    for part in (ids[:11], ids[11:]):
        states = encoder.encoder(input_ids=part[None]).last_hidden_state[0]
        ours, fingerprints = fingerprints[: len(part)], fingerprints[len(part) :]
        assert torch.allclose(ours, F.normalize(states, dim=-1), atol=1e-5)
