"""Law 9: the folder loads, plans, generates and re-saves itself where this package is not installed."""

from __future__ import annotations

import pytest

from semtoken_hf import convert_checkpoint
from tests.fixtures.children import run_clean

SCRIPT = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, resaved = sys.argv[1:]
torch.manual_seed(0)
ids = torch.randint(3, 300, (1, 600))
report = {}
for source in (folder, resaved):
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    model, info = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    base = AutoModel.from_pretrained(source, trust_remote_code=True)
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    outputs = model(ids, logits_to_keep=1)
    report[source] = {
        "classes": [type(x).__name__ for x in (tokenizer, model, base, config)],
        "modules": [type(x).__module__.split(".")[0] for x in (tokenizer, model, base, config)],
        "info": [name for name, keys in info.items() if keys],
        "kept": outputs.compressed_lengths.item(),
        "logits": outputs.logits.double().sum().item(),
        "generated": model.generate(ids, max_new_tokens=3, do_sample=False)[0, 600:].tolist(),
        "ids": tokenizer("the cats walking")["input_ids"],
        "protected": config.protected_token_ids,
    }
    model.save_pretrained(resaved)
    tokenizer.save_pretrained(resaved)
print("FACTS" + json.dumps([report[folder], report[resaved]]))
"""


@pytest.mark.parametrize("kind", ["transformer", "static"])
def test_loads_offline_without_the_package(make_llama, encoder_folder, tmp_path, kind):
    out = convert_checkpoint(
        make_llama(), encoder_folder, tmp_path / "out", encoder_kind=kind, static_dim=8, progress=False
    )
    first, again = run_clean(SCRIPT, out, tmp_path / "resaved", home=tmp_path / "home")
    assert first == again
    assert first["classes"] == [
        "SemTokenFastTokenizer",
        "SemTokenLlamaForCausalLM",
        "SemTokenLlamaModel",
        "SemTokenLlamaConfig",
    ]
    assert first["modules"] == ["transformers_modules"] * 4
    assert first["info"] == []
    assert 0 < first["kept"] < 300
    assert first["protected"] is not None
    assert first["protected"][:3] == [0, 1, 2]
