"""A family is two small files and a row: one is added here, from docs/compatibility.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from transformers import OlmoConfig, OlmoForCausalLM

from semtoken_hf import families
from tests.fixtures.tiny import COMPRESSION, LLAMA, random_ids

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"


def test_a_new_family_from_its_document(tmp_path, monkeypatch):
    """Its files as the document shows them; off it is the plain model, on it merges."""
    package = tmp_path / "another_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = DOCUMENT.read_text()
    named = re.findall(r"`src/semtoken_hf/(\w+\.py)`\n\n   ```python\n(.*?)   ```", text, re.S)
    assert [name for name, _ in named] == ["configuration_semtoken_olmo.py", "modeling_semtoken_olmo.py"]
    for name, code in named:
        code = re.sub(r"^   ", "", code, flags=re.M)
        for shared in ("configuration_semtoken", "causal_lm_semtoken", "modeling_semtoken"):
            code = code.replace(f"from .{shared} import", f"from semtoken_hf.{shared} import")
        (package / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config_class, _, model_class = families.classes_of("olmo", "Olmo", "another_package")
    sizes = {name: value for name, value in LLAMA.items() if name in OlmoConfig().to_dict()}
    model = model_class(config_class(**sizes, **COMPRESSION)).eval()
    plain = OlmoForCausalLM(OlmoConfig(**sizes)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "semantic_encoder" not in k})
    ids = random_ids(2, 60)
    with torch.no_grad():
        assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
        assert model(ids, logits_to_keep=1).compressed_lengths.tolist() == [25, 25]
    assert model.generate(ids, max_new_tokens=3).shape[0] == 2
    for name in [name for name in sys.modules if name.startswith("another_package")]:
        del sys.modules[name]
