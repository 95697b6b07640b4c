"""What each rank of `test_tensor_parallel.py` and `test_data_parallel.py` does: `python -m ... folder name ..`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import semtoken_hf  # noqa: F401, registers its classes
from tests.fixtures.children import write_facts
from tests.fixtures.tiny import left_padded, random_ids

RANK = int(os.environ.get("RANK", "0"))


def prompts() -> tuple[Tensor, Tensor]:
    """Of two lengths, left-padded."""
    return left_padded([random_ids(1, n, seed=n)[0] for n in (96, 70)])


def training_rows() -> tuple[Tensor, Tensor]:
    """Four rows and their labels: rows 0 and 1 for rank 0, rows 2 and 3 for rank 1."""
    ids = random_ids(4, 96, seed=5)
    return ids, ids.where(torch.arange(96) > 70, -100)


def whole(tensor: Tensor | None) -> Tensor | None:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return None if tensor is None else tensor.detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def read(model: Any) -> dict[str, Any]:
    """Everything that reads through the stage."""
    ids, mask = prompts()
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, logits_to_keep=2)
        off = model(ids, attention_mask=mask, logits_to_keep=2, compression=False)
        facts = {"logits": outputs.logits, "plan": outputs.span_ids, "off": off.logits}
        facts["slots"] = model.compress(ids, mask).inputs_embeds
        for name, arguments in {"greedy": {}, "beams": {"num_beams": 2}, "ratio": {"target_ratio": 4.0}}.items():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **arguments
            )
            cache = out.past_key_values
            facts[name] = {"tokens": out.sequences, "slots": cache.slot_lengths, "bytes": cache.memory_bytes()}
    return facts


def train(model: Any) -> dict[str, Any]:
    """Loss and gradients of one batch."""
    ids, labels = training_rows()
    outputs = model(ids, labels=labels)
    outputs.loss.backward()
    facts = {"loss": outputs.loss.detach(), "gradients": gradients(model), "kept": outputs.compressed_lengths}
    model.zero_grad()
    return facts


def tensor_parallel(folder: Path) -> dict[str, Any]:
    facts = {}
    for source in sorted((folder / "plain").iterdir()):
        config = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(source, distributed_config=config).eval()
        sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
        frozen = not any(p.requires_grad for n, p in model.named_parameters() if "semantic_encoder" in n)
        facts[source.name] = {**read(model), "sharded": sharded, "frozen": frozen}
        # PEFT 0.21 does not train LoRA on what Transformers 5.23 has sharded, of any model.
        if source.name != "adapter":
            facts[source.name] |= train(model)
        model.save_pretrained(folder / "saved" / source.name)
    return facts


def data_parallel(folder: Path) -> dict[str, Any]:
    """DDP over two steps, where every rank has rows of its own; and a step where rank 1 has nothing to merge."""
    model = AutoModelForCausalLM.from_pretrained(folder / "plain" / "learned").train()
    ids, labels = (rows[2 * RANK : 2 * RANK + 2] for rows in training_rows())
    facts: dict[str, Any] = {"steps": []}
    for unused in (False, True):
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        for _ in range(2):
            scored = ids if unused and RANK else labels
            outputs = ddp(input_ids=ids, labels=scored)
            outputs.loss.backward()
            merged = outputs.get("compressed_lengths") is not None
            facts["steps"].append({"merged": merged, "gradients": gradients(model)})
            model.zero_grad()
    return facts


def fully_sharded(folder: Path) -> dict[str, Any]:
    """FSDP2 by hand, its groups as `_no_split_modules` says, and by Transformers, in half precision, too."""
    facts = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder / "plain" / "learned", dtype=dtype)
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
        config = DistributedConfig(fsdp_size=2)
        own = AutoModelForCausalLM.from_pretrained(folder / "plain" / "learned", distributed_config=config, dtype=dtype)
        for name, sharded in {"torch": model, "transformers": own}.items():
            sharded.eval()
            ids, mask = prompts()
            outputs = sharded(ids, attention_mask=mask, logits_to_keep=2)
            found = {"logits": outputs.logits.detach(), "plan": outputs.span_ids}
            found["tokens"] = sharded.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            rows, labels = (part[2 * RANK : 2 * RANK + 2] for part in training_rows())
            sharded.train()(rows, labels=labels).loss.backward()
            facts[f"{name}, {dtype}"] = {**found, "gradients": gradients(sharded)}
    return facts


def pipeline_parallel(folder: Path) -> dict[str, Any]:
    config = {"distributed_config": DistributedConfig(pp_size=2)}
    try:
        AutoModelForCausalLM.from_pretrained(folder / "plain" / "learned", **config)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain" / "learned", **config, compression=False).eval()
    ids = random_ids(1, 96)
    return {"refusal": refusal, "tokens": model.generate(ids, max_new_tokens=4, do_sample=False)}


CODE_PATHS = {
    code_path.__name__: code_path for code_path in (tensor_parallel, data_parallel, fully_sharded, pipeline_parallel)
}

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(RANK)
    write_facts(Path(sys.argv[1]), {code_path: CODE_PATHS[code_path](Path(sys.argv[1])) for code_path in sys.argv[2:]})
    dist.barrier()
    dist.destroy_process_group()
