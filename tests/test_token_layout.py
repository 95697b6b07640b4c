"""Which tokens are planned together, against a plain walk over the rows."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semtoken_hf.token_layout import TokenLayout, build_layout, indices_where
from tests.fixtures.layouts import trimmed_layout

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def walk(valid, read, protected, num_sink_tokens: int, recent_window: int, min_length: int) -> dict[str, list]:
    """The fields of a TokenLayout and `mergeable`, token by token; the masks are nested lists [B][T]."""
    out: dict[str, list] = {field.name: [] for field in fields(TokenLayout)} | {"mergeable": []}
    for row, is_valid in enumerate(valid):
        columns = [t for t, v in enumerate(is_valid) if v]
        segments: list[list[int]] = []
        is_closed = True
        for place, column in enumerate(columns):
            is_scored = place > 0 and read[row][columns[place - 1]]
            if is_closed or is_scored:
                segments.append([])
            segments[-1].append(place)
            is_closed = is_scored or read[row][column]
        for places in segments:
            out["starts"].append(len(out["row"]))
            out["lengths"].append(len(places))
            was_solo = True
            for place in places:
                column = columns[place]
                is_scored = place > 0 and read[row][columns[place - 1]]
                is_solo = read[row][column] or is_scored or protected[row][column]
                is_solo = (
                    is_solo or place < num_sink_tokens or places[-1] - place < recent_window or len(places) < min_length
                )
                out["token_index"].append(row * len(is_valid) + column)
                out["row"].append(row)
                out["position"].append(place)
                out["segment"].append(len(out["starts"]) - 1)
                out["unmergeable"].append(is_solo)
                out["mergeable"].append(not is_solo and not was_solo)
                was_solo = is_solo
    return out


@dataclass
class Masks:
    valid: list[list[bool]]
    read: list[list[bool]]
    protected: list[list[bool]]


@st.composite
def masks(draw) -> Masks:
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    # Mostly True, mostly False, mostly False: as prompts are, so that segments have a length.
    often = st.integers(0, 5).map(bool)
    rarely = st.integers(0, 5).map(lambda i: i == 5)

    def grid(flags):
        return draw(st.lists(st.lists(flags, min_size=width, max_size=width), min_size=batch, max_size=batch))

    return Masks(grid(often), grid(rarely), grid(rarely))


def lay_out(m: Masks, num_sink_tokens: int, recent_window: int, min_length: int) -> TokenLayout:
    return trimmed_layout(
        torch.tensor(m.valid),
        torch.tensor(m.read),
        torch.tensor(m.protected),
        num_sink_tokens,
        recent_window,
        min_length,
    )


@given(masks(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 8))
@PROPERTY
def test_equals_the_walk(m: Masks, num_sink_tokens: int, recent_window: int, min_length: int) -> None:
    layout = lay_out(m, num_sink_tokens, recent_window, min_length)
    for name, expected in walk(m.valid, m.read, m.protected, num_sink_tokens, recent_window, min_length).items():
        values = getattr(layout, name)
        assert values.tolist() == expected, name
        assert values.dtype == (torch.bool if name in ("unmergeable", "mergeable") else torch.int64), name


@given(masks(), st.integers(0, 4), st.integers(0, 4))
@PROPERTY
def test_segments_end_where_something_is_read(m: Masks, num_sink_tokens: int, recent_window: int) -> None:
    """Said a second time, without a walk: what law 3 needs of the segments."""
    layout = lay_out(m, num_sink_tokens, recent_window, 0)
    is_read = torch.tensor(m.read).flatten()[layout.token_index]
    last = layout.starts + layout.lengths - 1
    assert is_read.sum() == is_read[last].sum()
    follows = is_read[:-1].nonzero().squeeze(1) + 1
    scored = follows[layout.position[follows] > 0]
    assert (layout.lengths[layout.segment[scored]] == 1).all()
    assert layout.unmergeable[scored].all()
    assert not layout.mergeable[scored].any()


def pack(tokens: int, columns: list[int], width: int, **marks: list[int]) -> TokenLayout:
    """One row whose tokens lie in the given columns; `marks` are places among the tokens."""
    assert tokens == len(columns)
    grids = {name: torch.zeros(1, width, dtype=torch.bool) for name in ("valid", "read", "protected")}
    grids["valid"][0, columns] = True
    for name, places in marks.items():
        grids[name][0, [columns[p] for p in places]] = True
    return trimmed_layout(**grids, num_sink_tokens=2, recent_window=3, min_length=4)


@given(st.sets(st.integers(0, 29), min_size=20, max_size=20), st.sets(st.integers(0, 19), max_size=4))
@PROPERTY
def test_padding_on_any_side_and_holes_change_nothing(columns: set[int], read: set[int]) -> None:
    alone = pack(20, list(range(20)), 20, read=sorted(read), protected=[9])
    padded = pack(20, sorted(columns), 30, read=sorted(read), protected=[9])
    for name in ("row", "position", "segment", "starts", "lengths", "unmergeable", "mergeable"):
        assert torch.equal(getattr(alone, name), getattr(padded, name)), name
    assert padded.token_index.tolist() == sorted(columns)


def runs(flags: Tensor) -> str:
    return "".join("#" if f else "." for f in flags.tolist())


def test_an_example() -> None:
    layout = pack(16, list(range(16)), 16, read=[9, 10], protected=[4])
    assert layout.lengths.tolist() == [10, 1, 1, 4]
    # Two sinks, the protected token, a recent window of 3 up to the read one; 10, 11 are scored; a window again.
    assert runs(layout.unmergeable) == "##..#..#####.###"
    assert runs(layout.mergeable) == "...#..#........."


def test_what_is_read_at_padding_does_not_count() -> None:
    valid = torch.tensor([[False, True, True, True]])
    read = torch.tensor([[True, False, False, True]])
    layout = trimmed_layout(valid, read, torch.zeros_like(valid), 0, 1, 0)
    assert layout.lengths.tolist() == [3]
    assert runs(layout.unmergeable) == "..#"


def test_rows_never_share_a_segment_even_without_a_read_token() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    layout = trimmed_layout(~nothing, nothing, nothing, 0, 0, 0)
    assert layout.segment.tolist() == [0] * 5 + [1] * 5
    assert runs(layout.mergeable) == ".####.####"


def test_minimum_length_counts_the_segment_not_the_row() -> None:
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    read = nothing.clone()
    read[0, 4] = True
    layout = trimmed_layout(~nothing, read, nothing, 0, 0, 6)
    assert layout.lengths.tolist() == [5, 1, 6]
    assert runs(layout.unmergeable) == "######......"


def test_nothing_but_padding() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    layout = trimmed_layout(nothing, nothing, nothing, 1, 1, 1)
    assert all(getattr(layout, f.name).numel() == 0 for f in fields(layout))
    assert layout.mergeable.numel() == 0


@given(masks())
@PROPERTY
def test_before_it_is_trimmed_padding_follows(m: Masks) -> None:
    """Every tensor has the size of the batch, and what is cut off says nothing."""
    valid = torch.tensor(m.valid)
    layout, tokens = build_layout(valid, torch.tensor(m.read), torch.tensor(m.protected), 1, 1, 2), int(valid.sum())
    assert all(len(getattr(layout, field.name)) == valid.numel() for field in fields(TokenLayout))
    assert sorted(layout.token_index.tolist()) == list(range(valid.numel()))
    assert torch.equal(layout.is_token, torch.arange(valid.numel()) < tokens)
    assert torch.equal(valid.flatten()[layout.token_index], layout.is_token)
    assert not layout.mergeable[tokens:].any()
    segments = int((layout.lengths > 0).sum())
    assert (layout.starts[segments:] == tokens).all()
    assert int(layout.lengths.sum()) == tokens


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 40))
@PROPERTY
def test_indices_of_a_known_number(flags: list[bool], size: int) -> None:
    expected = [i for i, flag in enumerate(flags) if flag] + [len(flags)] * size
    assert indices_where(torch.tensor(flags, dtype=torch.bool), size).tolist() == expected[:size]
