"""Saved checkpoints that are damaged on purpose, then loaded and used."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from semtoken_hf import SemTokenFastTokenizer, SemTokenLlamaForCausalLM, SpanPlanner
from tests.fixtures.tiny import BERT, random_ids, tiny_model, tiny_tokenizer

from . import hostile
from .configurations import FIELDS, SMALL
from .damage import WEIGHTS, damage_file
from .judging import Family, require
from .oracle import Asked, check_prompt

KINDS: dict[str, dict[str, Any]] = {
    "static": {},
    "bert": {"encoder_config": BERT, "encoder_window": 32},
    "sharded": {},
    "learned": {"merge_mode": "learned", "merger_rank": 4},
}
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
GENERATION, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
TEXT_FILES = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
# Fields of a family, which Transformers reads as it does those of a plain Llama.
PLAIN_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
    *("vocab_size", "max_position_embeddings", "rope_parameters", "head_dim", "hidden_act", "rms_norm_eps"),
    *("model_type", "architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("auto_map", "transformers_version", "initializer_range", "attention_bias", "quantization_config"),
)
ENCODER_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "dtype")
HUGE = (2**40, 2**62)
LOADERS = ("class", "auto", "planner", "tokenizer", "generate")
USED = {"planner": (CONFIG, WEIGHTS, INDEX), "tokenizer": (TOKENIZER, TOKENIZER_CONFIG, CONFIG, WEIGHTS, INDEX)}
PROMPT = "the cat sat on the mat and the dog ran to the man " * 3


@functools.cache
def originals() -> Path:
    """A folder for each of `KINDS`, made once."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for kind, fields in KINDS.items():
        model = tiny_model(**{**SMALL, **fields})
        model.save_pretrained(root / kind, max_shard_size="20KB" if kind == "sharded" else "1GB")
        tiny_tokenizer().save_pretrained(root / kind)
        for code in (root / kind).glob("*.py"):
            code.unlink()
    return root


@dataclass(frozen=True)
class Case:
    """A checkpoint, how it is loaded, and what is done to its files before."""

    kind: str
    loader: str
    damage: tuple[tuple[Any, ...], ...]


def _is_harmless(value: Any) -> bool:
    """Not so large that Transformers itself would take the memory, before it finds that the weights do not fit."""
    if isinstance(value, (list, dict)):
        return all(map(_is_harmless, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool) or not isinstance(value, int) or value < 2000 or value >= 2**40


json_values = st.sampled_from(HUGE) | hostile.anything.filter(lambda v: len(repr(v)) < 4000)
sizes = json_values.filter(_is_harmless)
set_field = st.tuples(st.just("set"), st.just(CONFIG), st.sampled_from(FIELDS), json_values)
set_plain = st.tuples(st.just("set"), st.just(CONFIG), st.sampled_from(PLAIN_FIELDS), sizes)
set_encoder = st.tuples(st.just("set encoder"), st.just(CONFIG), st.sampled_from(ENCODER_FIELDS), sizes)
set_generation = st.tuples(
    st.just("set"),
    st.just(GENERATION),
    st.sampled_from(["target_ratio", "compression", "eos_token_id", "pad_token_id", "max_new_tokens", "num_beams"]),
    json_values.filter(lambda v: isinstance(v, bool) or not isinstance(v, int) or v < 100),
)
set_tokenizer = st.tuples(
    st.just("set"),
    st.just(TOKENIZER_CONFIG),
    st.sampled_from(["tokenizer_class", "pad_token", "bos_token", "model_max_length", "padding_side", "auto_map"]),
    json_values,
)
place = st.floats(0, 1, exclude_max=True)
drop_field = st.tuples(st.just("drop"), st.just(CONFIG), st.integers(0, 200))
text_damage = st.tuples(
    st.sampled_from(["truncate", "flip", "empty", "remove", "garbage", "not an object"]),
    st.sampled_from(TEXT_FILES),
    place,
    st.integers(1, 255),
)
binary_damage = st.tuples(
    st.sampled_from(["truncate", "truncate", "flip", "flip header", "empty", "remove", "garbage", "long header"]),
    st.just(WEIGHTS),
    place,
    st.integers(1, 255),
)
tensor_damage = st.tuples(
    st.sampled_from(["rename", "drop tensor", "other shape", "other dtype", "foreign", "nan", "scalar"]),
    st.just(WEIGHTS),
    st.integers(0, 200),
)
index_damage = st.tuples(
    st.sampled_from(
        ["truncate", "flip", "empty", "remove", "garbage", "not an object", "no map", "other map", "paths"]
    ),
    st.just(INDEX),
    place,
    st.integers(1, 255),
)
damages = st.one_of(
    set_field, set_field, set_plain, set_encoder, set_generation, set_tokenizer, drop_field, text_damage,
    binary_damage, binary_damage, tensor_damage, tensor_damage, index_damage,
)  # fmt: skip


@st.composite
def cases(draw: Any) -> Case:
    damage = draw(st.lists(damages, min_size=1, max_size=2))
    kind = "sharded" if any(part[1] == INDEX for part in damage) else draw(st.sampled_from(list(KINDS)))
    loader = draw(st.sampled_from(LOADERS))
    files = {part[1] for part in damage}
    if files & {TOKENIZER, TOKENIZER_CONFIG}:
        loader = "tokenizer"
    elif GENERATION in files:
        loader = "generate"
    return Case(kind, loader, tuple(damage))


def use(model: Any, is_damaged: bool) -> str:
    """Compress and read a prompt; with damaged numbers, the plan must still be one."""
    vocabulary = min(model.config.vocab_size, 300)
    ids = random_ids(1, 60) % vocabulary
    with torch.no_grad():
        prompt = model.compress(ids)
        logits = model(ids, logits_to_keep=2).logits
    require(logits.shape[:2] == (1, 2), "logits of another shape")
    if not is_damaged:
        asked = Asked(model.config, ids, torch.ones_like(ids, dtype=torch.bool))
        check_prompt(asked, prompt, model.get_input_embeddings())
        require(bool(logits.isfinite().all()), "logits are not finite")
    require(int(prompt.kept_lengths[0]) <= 60 and int(prompt.slot_lengths.sum()) == 60, "tokens were lost")
    return "merged" if prompt.is_merged else "nothing merged"


def load_and_use(folder: Path, case: Case) -> str:
    numbers = ("flip", "nan", "drop tensor", "rename", "other dtype")
    is_damaged = any(part[0] in numbers or part[2] in PLAIN_FIELDS for part in case.damage)
    # Kept small, since a hostile one may ask for more.
    if case.loader == "planner":
        plan = SpanPlanner.from_pretrained(str(folder)).plan(random_ids(1, 60))
        require(plan.original_lengths.tolist() == [60] and plan.span_ids.shape == (1, 60), "tokens were lost")
        return "planned"
    if case.loader == "tokenizer":
        tokenizer = SemTokenFastTokenizer.from_pretrained(str(folder))
        encoding = tokenizer(PROMPT, return_span_ids=True, truncation=True, max_length=200)
        require(len(encoding["span_ids"]) == len(encoding["input_ids"]), "span_ids of another length")
        return "planned"
    if case.loader == "auto":
        return use(AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False), is_damaged)
    model = SemTokenLlamaForCausalLM.from_pretrained(str(folder))
    if case.loader == "class":
        return use(model, is_damaged)
    ids = random_ids(1, 40) % min(model.config.vocab_size, 300)
    sequences = model.generate(ids, max_new_tokens=2, do_sample=False)
    require(torch.equal(sequences.reshape(-1, sequences.shape[-1])[:1, :40], ids), "the prompt was changed")
    return "generated"


def with_damage(case: Case, function: Any) -> Any:
    """`function` of a folder with the files of the case, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=originals()))
    try:
        shutil.copytree(originals() / case.kind, folder, dirs_exist_ok=True)
        for part in case.damage:
            damage_file(folder, part)
        return function(folder, case)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(case: Case) -> str:
    return with_damage(case, load_and_use)


def plain_use(folder: Path, case: Case) -> None:
    if case.loader == "tokenizer":
        PreTrainedTokenizerFast.from_pretrained(str(folder))(PROMPT, truncation=True, max_length=200)
        return
    if case.loader == "auto":
        config = folder / CONFIG
        if config.exists():
            config.write_bytes(config.read_bytes().replace(b"semtoken_llama", b"llama"))
        model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)
    else:
        model = LlamaForCausalLM.from_pretrained(str(folder))
    ids = random_ids(1, 40) % min(model.config.vocab_size, 300)
    with torch.no_grad():
        model(ids, logits_to_keep=2)
        if case.loader == "generate":
            model.generate(ids, max_new_tokens=2, do_sample=False)


def run_plain(case: Case) -> None:
    with_damage(case, plain_use)


def names_of(case: Case) -> tuple[str, ...]:
    """The files, the fields, and how messages speak of them."""
    names = []
    for part in case.damage:
        names += [part[1], part[2] if isinstance(part[2], str) else part[1]]
        if part[1] in (WEIGHTS, INDEX):
            names += ["safetensors", "semantic encoder", "checkpoint", "nowhere.safetensors"]
        if part[1] == CONFIG:
            names += ["config.json", "encoder_config", "model_type"]
            names.append("trust_remote_code")
        if part[0] in ("drop", "flip", "truncate") and part[1] == CONFIG:
            names += [*FIELDS, *PLAIN_FIELDS, "input_ids", "checkpoint"]
        if part[0] == "set":
            names += FIELDS if part[2] in FIELDS else ["input_ids", "checkpoint"]
        if part[0] == "set encoder":
            names += ["encoder_window", "checkpoint"]
        if part[1] in (TOKENIZER, TOKENIZER_CONFIG):
            names += ["tokenizer", "input_ids"]
    return tuple(dict.fromkeys(map(str, names)))


FILES = Family(cases(), run, names_of, run_plain, ("ignore_mismatched_sizes",), weight=2.5, megabytes=1024)
