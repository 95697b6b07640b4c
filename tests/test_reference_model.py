"""A real instruct model that others trained, from a GGUF file: exact when off, and it still answers when compressed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from scripts.quickstart import QUESTIONS, prompt_of
from semtoken_hf.evaluation.prompts import Example, tokenise
from tests.fixtures.children import ROOT
from tests.fixtures.reference import gguf_place, reference_folder

CHAPTER = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def folder():
    return reference_folder()


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("text-generation", model=str(folder), dtype=torch.float32, device=-1)


def answer(pipe, chat, **call):
    return pipe(chat, max_new_tokens=16, do_sample=False, return_full_text=False, **call)[0]["generated_text"]


def test_off_is_the_plain_model_that_transformers_loads_from_the_same_file(folder, pipe):
    plain = AutoModelForCausalLM.from_pretrained(**gguf_place(), dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(**gguf_place())
    chat = prompt_of(CHAPTER[:2000], QUESTIONS[0], is_chat=True)
    assert pipe.tokenizer.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        assert torch.equal(pipe.model(ids, compression=False).logits, plain(ids).logits)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(pipe.model.generate(ids, **options, compression=False), plain.generate(ids, **options))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert pipe.model.generation_config.eos_token_id == plain.generation_config.eos_token_id


def test_it_answers_about_the_end_of_a_chapter_in_fewer_positions(pipe):
    chat = prompt_of(CHAPTER, QUESTIONS[2], is_chat=True)
    assert "manager" in answer(pipe, chat, compression=False)
    assert "manager" in answer(pipe, chat)
    ids = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    cache = pipe.model.generate(**ids, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    tokens = ids["input_ids"].shape[1]
    assert cache.original_lengths.tolist() == [tokens]
    assert cache.compressed_lengths.tolist() == [-(-tokens * 10 // 24)]


def test_the_evaluation_speaks_to_it_in_its_template(pipe):
    """Without the template every answer is empty, even with the full context."""
    example = Example(
        "e", f"{CHAPTER[:1500]}\n\n", "Who is the senior partner?", ["Sherwood"], answer_prefix="\nAnswer:"
    )
    prompt = tokenise(example, pipe.tokenizer, 4096, 64)
    text = pipe.tokenizer.decode(prompt.ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("Who is the senior partner?<|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert pipe.tokenizer.decode(prompt.ids[prompt.opening]).endswith("<|im_start|>user\n")
    assert prompt.round_trip
