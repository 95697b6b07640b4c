"""Big checkpoints are converted shard by shard and loaded without a second copy in memory."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.children import run_python
from tests.fixtures.tiny import LLAMA, tiny_tokenizer

SHARD = 40_000_000
# Sizes in kB, as the kernel says them. A file that is mapped counts as resident as long as nobody needs its pages, so:
# what is private (RssAnon), and where nothing is cast also everything (VmHWM, since it was last cleared).
CHILD = """
import gc, json, sys, threading
import torch
from semtoken_hf import SemTokenLlamaForCausalLM, convert_checkpoint

def status():
    lines = [line.split() for line in open("/proc/self/status")]
    return {line[0][:-1]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:", "RssAnon:")}

def growth(function):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, private, ended = status(), [0], threading.Event()
    def watch():
        while not ended.wait(0.001):
            private.append(status()["RssAnon"])
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        ended.set()
        watcher.join()
    after = status()
    private = max(*private, after["RssAnon"]) - before["RssAnon"]
    facts = {"private": private, "all": after["VmHWM"] - before["VmRSS"]}
    if result is not None:
        facts["weights"] = sum(p.nbytes for p in result.parameters()) // 1024
    return facts

def load(**arguments):
    model = SemTokenLlamaForCausalLM.from_pretrained(folder, **arguments)
    # Every page of what was mapped.
    assert all(p.sum().isfinite() for p in model.parameters())
    return model

source, folder, shard = sys.argv[1:]
def convert():
    convert_checkpoint(source, None, folder, segmentation_mode="uniform", max_shard_size=int(shard), progress=False)

facts = {"convert": growth(convert), "load": growth(load), "cast": growth(lambda: load(dtype=torch.bfloat16))}
print("FACTS" + json.dumps(facts))
"""


def write_checkpoint(folder):
    """A plain Llama of 310 MB of random weights, a file for each layer."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(**{**LLAMA, **sizes, "num_key_value_heads": 8})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weight_map = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        weight_map[name] = f"model-{layer}.safetensors"
    for file in sorted(set(weight_map.values())):
        tensors = {name: torch.empty(shapes[name]).uniform_(-0.05, 0.05) for name in shapes if weight_map[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values()) * 4 // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account of memory is Linux's")
def test_one_copy_at_most(tmp_path):
    size = write_checkpoint(tmp_path)
    assert size > 300_000
    facts = run_python(CHILD, tmp_path, tmp_path / "converted", SHARD)
    convert, load, cast = facts["convert"], facts["load"], facts["cast"]
    # A shard of what is read and of what is written, and the modules that a conversion imports.
    assert 0.5 * SHARD / 1024 < convert["all"] < 2.5 * SHARD / 1024 < 0.35 * size
    assert size <= load["weights"] < 1.01 * size
    assert 0.95 < load["all"] / load["weights"] < 1.3
    # The file's pages are the kernel's to take back.
    assert 0.95 < cast["private"] / cast["weights"] < 1.3
    assert 0.49 < cast["weights"] / size < 0.52
