"""Stage 1 is cheap: bounded memory, calls of one shape, no wait for the device, and layers in bfloat16."""

from __future__ import annotations

import json
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from semtoken_hf import SpanPlanner, semantic_encoder
from semtoken_hf.semantic_encoder import FrozenLinear, SemanticEncoder, windows_per_call
from semtoken_hf.token_layout import TokenLayout
from tests.fixtures.tiny import random_ids, tiny_config, tiny_model
from tests.test_semantic_encoder import BERT, each_kind, make_encoder, segments_of, spied_encoder

IDS = random_ids(1, 150)
BF16 = {"encoder_config": BERT, "encoder_window": 16, "encoder_overlap": 4, "encoder_dtype": "bfloat16"}


class RowwiseEncoder(nn.Module):
    """States that depend on a token and its place in the window, bit for bit the same in whatever call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None) -> SimpleNamespace:
        place = torch.arange(1, inputs_embeds.shape[1] + 1, dtype=torch.float32)[:, None]
        return SimpleNamespace(last_hidden_state=inputs_embeds * place.sqrt())


def state_by_hand(encoder: SemanticEncoder, ids: Tensor, offset: int) -> Tensor:
    """The state of one token of one segment: of the windows that hold it, the one whose edge is farthest; else the
    earlier one."""
    length, stride = encoder.window, encoder.window - encoder.overlap
    starts = sorted({*range(0, max(1, len(ids) - length), stride), max(0, len(ids) - length)})
    end = min(length, len(ids))
    margins = {s: min(offset - s, s + end - 1 - offset) for s in starts if s <= offset < s + end}
    start = max(margins, key=lambda s: (margins[s], -s))
    embeds = encoder.encoder.get_input_embeddings()(ids[None, start : start + length])
    return encoder.encoder(embeds, None).last_hidden_state[0, offset - start]


def fingerprints_by_hand(encoder: SemanticEncoder, ids: Tensor, layout: TokenLayout) -> Tensor:
    """Every state in memory at once, the running mean over all of them."""
    if encoder.is_static:
        states = encoder.encoder.embeddings(ids)
    else:
        parts = ids.split(layout.lengths.tolist())
        rows = [state_by_hand(encoder, part, i) * (len(part) > 1) for part in parts for i in range(len(part))]
        states = torch.stack(rows)
    total, count = states.clone(), torch.ones_like(layout.segment)
    for shift in range(1, min(encoder.radius, len(ids) - 1) + 1):
        same = layout.segment[shift:] == layout.segment[:-shift]
        total[:-shift] += states[shift:] * same[:, None]
        total[shift:] += states[:-shift] * same[:, None]
        count[:-shift] += same
        count[shift:] += same
    return F.normalize(total / count[:, None], dim=-1)


@each_kind
@pytest.mark.parametrize("radius", [0, 2, 9])
@pytest.mark.parametrize("step", [1, 7, 4096])
@torch.no_grad()
def test_step_by_step_is_bit_for_bit_all_at_once(monkeypatch, kind: str, radius: int, step: int) -> None:
    monkeypatch.setattr(semantic_encoder, "TOKENS_PER_STEP", step)
    monkeypatch.setattr(semantic_encoder, "WINDOWS_PER_CALL", 3)
    encoder = make_encoder(kind, fingerprint_radius=radius)
    if kind == "transformer":
        encoder.encoder, encoder.width = RowwiseEncoder(), 8
    layout, ids = segments_of(50, 1, 3, 70, 16, 17, min_length=2), random_ids(1, 157)[0]
    assert torch.equal(encoder(ids, layout), fingerprints_by_hand(encoder, ids, layout))


class Watch(TorchDispatchMode):
    """Raises where the host would wait for the device; notes the largest tensors that came into being."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "repeat_interleave", "equal", "item")

    def __init__(self, noted_from: int = 0) -> None:
        super().__init__()
        self.noted_from, self.large = noted_from, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name == wait or name.startswith(f"{wait}_") for wait in self.WAITS):
            raise AssertionError(f"the host waits for {func}")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("the host waits for a mask")
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() > self.noted_from:
            self.large[out.untyped_storage().data_ptr()] = out
        return out


@each_kind
@pytest.mark.parametrize("lengths", [(50, 70, 16), (50, 3, 70)], ids=["filled", "padded"])
def test_no_wait_where_the_windows_are_known(kind: str, lengths: tuple[int, ...]) -> None:
    encoder, layout = make_encoder(kind), segments_of(*lengths)
    ids = random_ids(1, sum(lengths))[0]
    expected = encoder(ids, layout)
    with Watch():
        windows = encoder.count_windows(layout)
    assert (windows.dtype, windows.shape) == (torch.int64, ())
    with Watch():
        fingerprints = encoder(ids, layout, windows=int(windows.tolist()) if kind == "static" else known(lengths))
    assert torch.equal(fingerprints, expected)
    assert int(windows) == (0 if kind == "static" else known(lengths))
    if kind == "transformer":
        with pytest.raises(AssertionError, match="waits"), Watch():
            encoder(ids, layout)


def known(lengths: tuple[int, ...]) -> int:
    """Windows of 16 tokens that share 4."""
    total = sum(1 + max(0, -(-(n - 16) // 12)) for n in lengths)
    return -total if min(lengths) < 16 else total


def test_windows_of_segments_where_nothing_may_merge_do_not_count() -> None:
    assert int(make_encoder("transformer").count_windows(segments_of(30, 5, 40, min_length=10))) == 3 + 3
    assert int(make_encoder("transformer").count_windows(segments_of(3, 5, min_length=10))) == 0


@each_kind
def test_segments_of_no_tokens_at_the_end_change_nothing(kind: str) -> None:
    encoder, layout, ids = make_encoder(kind), segments_of(50, 9, 70), random_ids(1, 129)[0]
    own = {f.name: getattr(layout, f.name) for f in fields(layout)}
    own["starts"] = F.pad(layout.starts, (0, 3), value=129)
    own["lengths"] = F.pad(layout.lengths, (0, 3))
    padded: Any = SimpleNamespace(**own, mergeable=layout.mergeable)
    assert torch.equal(encoder.count_windows(padded), encoder.count_windows(layout))
    assert torch.equal(encoder(ids, padded), encoder(ids, layout))


@each_kind
def test_one_tensor_of_all_fingerprints_and_nothing_else_of_that_size(kind: str) -> None:
    encoder, layout = make_encoder(kind, encoder_window=64), segments_of(9000, 6000)
    ids = random_ids(1, 15000)[0]
    windows = int(encoder.count_windows(layout))
    with Watch(noted_from=15000 * encoder.width // 2) as watch:
        fingerprints = encoder(ids, layout, windows)
    assert list(watch.large) == [fingerprints.untyped_storage().data_ptr()]


def test_every_call_has_one_shape() -> None:
    encoder, spy = spied_encoder(encoder_window=64, encoder_overlap=8)
    for lengths, count, size in (((2500,), 45, 23), ((150,), 3, 12), ((1500, 2000), 27 + 36, 32)):
        spy.windows.clear(), spy.masks.clear()
        layout = segments_of(*lengths)
        assert int(encoder.count_windows(layout)) == count
        encoder(torch.arange(sum(lengths)), layout)
        assert len(spy.windows) == size * len(spy.masks)
        assert len(set(map(tuple, spy.windows))) == count


@pytest.mark.parametrize(
    ("total", "window", "device", "size"),
    [
        (1, 128, "cpu", 6),
        (32, 128, "cpu", 32),
        (33, 128, "cpu", 17),
        (3, 16, "cpu", 32),
        (3, 128, "cuda", 32),
        (0, 128, "cpu", 32),
    ],
)
def test_windows_per_call(total: int, window: int, device: str, size: int) -> None:
    assert windows_per_call(total, window, torch.device(device)) == size


def test_a_mask_only_where_there_is_padding() -> None:
    for lengths, attention, dimensions in (((50, 16), "sdpa", None), ((50, 5), "sdpa", 4), ((50, 5), "eager", 2)):
        encoder, spy = spied_encoder(attention)
        encoder(torch.arange(sum(lengths)), segments_of(*lengths))
        assert {None if mask is None else mask.ndim for mask in spy.masks} == {dimensions}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_not_seen(attention: str, dtype: str) -> None:
    encoder = make_encoder("transformer", encoder_dtype=dtype)
    encoder.encoder.config._attn_implementation_internal = attention
    ids = random_ids(1, 11)[0]
    fingerprints = encoder(torch.cat([ids, random_ids(1, 40, seed=1)[0]]), segments_of(11, 40))[:11]
    states = encoder.encoder(input_ids=ids[None]).last_hidden_state[0].float()
    around = [states[max(0, i - 2) : i + 3].mean(0) for i in range(11)]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert torch.allclose(fingerprints, F.normalize(torch.stack(around), dim=-1), atol=tolerance)


def dtypes_of(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.base_model.semantic_encoder.parameters()}


def test_bfloat16_layers_give_float32_fingerprints_close_to_those_of_float32() -> None:
    layout, ids = segments_of(40, 100), random_ids(1, 140)[0]
    whole, half = make_encoder("transformer"), make_encoder("transformer", encoder_dtype="bfloat16")
    half.encoder.load_state_dict(whole.encoder.state_dict())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ours, theirs = half(ids, layout), whole(ids, layout)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, theirs)
    assert (ours * theirs).sum(1).min() > 0.999
    assert torch.allclose(ours.norm(dim=1), torch.ones(140), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(half(ids, layout), ours)
    assert any(type(module) is FrozenLinear for module in half.modules())
    assert not any(type(module) is nn.Linear for module in half.modules())


def test_a_table_stays_float32() -> None:
    assert {p.dtype for p in make_encoder("static", encoder_dtype="bfloat16").parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_bfloat16_layers_whatever_the_dtype_of_the_model(tmp_path, dtype: Any) -> None:
    model = tiny_model(**BF16)
    plan = model.compress(IDS).span_ids
    assert plan.max() < 140
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {file.get_tensor(k).dtype for k in file.keys() if "semantic_encoder" in k}  # noqa: SIM118
    assert stored == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    for move in ("half", "float", "bfloat16", "cpu"):
        assert dtypes_of(loaded) == {torch.bfloat16}
        assert torch.equal(loaded.compress(IDS).span_ids, plan)
        getattr(loaded, move)()
    assert dtypes_of(loaded) == {torch.bfloat16}
    assert torch.equal(SpanPlanner.from_pretrained(tmp_path).plan(IDS).span_ids, plan)
    loaded.save_pretrained(tmp_path / "again")
    assert dtypes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == {torch.bfloat16}


def test_a_row_alone_and_in_a_batch_get_one_plan_from_bfloat16() -> None:
    model = tiny_model(**BF16)
    ids, mask = random_ids(3, 150), torch.ones(3, 150, dtype=torch.long)
    mask[0, :80] = 0
    together = model.compress(ids, mask).span_ids
    for row, start in ((0, 80), (1, 0), (2, 0)):
        assert torch.equal(together[row, start:], model.compress(ids[row : row + 1, start:]).span_ids[0])


def test_wide_bfloat16_layers_read_a_row_alone_as_in_a_batch() -> None:
    """To the last bit, where a CPU multiplies small matrices in another order than large ones."""
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    config = {**BERT, **sizes, "max_position_embeddings": 128}
    encoder = SemanticEncoder(tiny_config(encoder_config=config, encoder_dtype="bfloat16"))
    ids = random_ids(1, 4 * 576)[0]
    alone, together = encoder(ids[:576], segments_of(576)), encoder(ids, segments_of(*[576] * 4))
    assert torch.equal(alone, together[:576])


def test_loading_in_another_dtype_of_the_encoder(tmp_path) -> None:
    model = tiny_model(**{**BF16, "encoder_dtype": "float32"})
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, encoder_dtype="bfloat16")
    assert dtypes_of(half) == {torch.bfloat16}
    table = model.base_model.semantic_encoder.encoder.get_input_embeddings().weight
    assert torch.equal(half.base_model.semantic_encoder.encoder.get_input_embeddings().weight, table.bfloat16())


CAPABILITIES = {"avx512_bf16": False, "amx_bf16": False, "bf16": False, "sve_bf16": False}


@pytest.mark.parametrize(
    ("kernels", "found", "dtype"),
    [
        ("AVX512", "avx512_bf16", torch.bfloat16),
        ("AVX512", "amx_bf16", torch.bfloat16),
        ("AVX512", None, torch.float32),
        ("AVX2", "avx512_bf16", torch.float32),
    ],
)
def test_auto_is_what_the_device_multiplies(tmp_path, monkeypatch, kernels, found, dtype) -> None:
    monkeypatch.setattr(semantic_encoder, "NARROW_KERNELS", ("AVX2",))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    has = CAPABILITIES | ({found: True} if found else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert semantic_encoder.native_dtype(torch.device("cpu")) == dtype
    model = tiny_model(**{**BF16, "encoder_dtype": "auto"})
    assert dtypes_of(model) == {dtype}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.config.encoder_dtype == "auto"
    for move in ("half", "float", "bfloat16", "cpu"):
        assert dtypes_of(loaded) == {dtype}
        getattr(loaded, move)()
    assert loaded.compress(IDS).kept_lengths.sum() < IDS.numel()


def test_auto_follows_the_device_that_the_model_is_moved_to(monkeypatch) -> None:
    on = {"cpu": torch.float32, "meta": torch.bfloat16}
    monkeypatch.setattr(semantic_encoder, "native_dtype", lambda device: on[device.type])
    model = tiny_model(**{**BF16, "encoder_dtype": "auto"})
    assert dtypes_of(model) == {torch.float32}
    assert dtypes_of(model.to("meta")) == {torch.bfloat16}


def test_a_checkpoint_from_before_the_field_follows_its_device(tmp_path) -> None:
    tiny_model(**BF16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["encoder_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dtypes_of(loaded) == {semantic_encoder.native_dtype(torch.device("cpu"))}
