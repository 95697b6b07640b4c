"""Whether a checkpoint's folder is whole, fits together, and carries the code of this version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...adapter_semtoken import ADAPTER_FILES
from ...configuration_semtoken import SemTokenStaticEncoderConfig
from ...conversion.checkpoint import causal_lm_class, check_tensors
from ...conversion.source import FAMILY_PREFIX, read_model_type
from ...conversion.weights import find_tensors, rename_as_loaded, shortened
from ...publishing.module_hashes import compare_modules
from ...publishing.selection import select_files
from ...semantic_encoder import native_dtype
from ...tokenization_semtoken_fast import SemTokenFastTokenizer
from ..output import explain
from .checks import Check
from .installation import installed_version

GROUP = "Checkpoint"
# Embeddings are often padded to a round number, by less than this share of them.
PADDING = 0.1
AGAIN = "convert or save the checkpoint again, or download it again"


def folder_of(checkpoint: str) -> Path:
    """A local folder, or where the cache has a Hub repository; nothing is downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise FileNotFoundError(
            f"{checkpoint} is no folder, and not in the cache of the Hub: `hf download {checkpoint}` gets it"
        ) from None


def check_checkpoint(folder: Path) -> tuple[list[Check], PreTrainedConfig | None]:
    """All checks of a folder; its configuration, if that is valid."""
    checks = [_guarded("files", lambda: _check_files(folder))]
    config: list[Any] = []
    checks.append(_guarded("configuration", lambda: _check_config(folder, config)))
    if not config:
        return [*checks, _check_modules(folder)], None
    return [
        *checks,
        _guarded("weights", lambda: _check_weights(folder, config[0])),
        _guarded("encoder", lambda: _check_encoder(folder, config[0])),
        _guarded("tokenizer", lambda: _check_tokenizer(folder, config[0])),
        _guarded("adapter", lambda: _check_adapter(folder, config[0])),
        _check_modules(folder),
    ], config[0]


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """Whatever a damaged file makes a library raise is a fault of the folder."""
    try:
        return look()
    except Exception as error:
        return Check(GROUP, name, "fault", " ".join(explain(error).split()), AGAIN)


def _check_files(folder: Path) -> Check:
    selection = select_files(folder)
    size = sum(file.stat().st_size for file in selection.files.values())
    return Check(GROUP, "files", "ok", f"{len(selection.files)} that loading reads or the card shows, {size:,} bytes")


def _check_config(folder: Path, found: list[Any]) -> Check:
    model_type = read_model_type(folder)
    if not model_type.startswith(FAMILY_PREFIX) or model_type not in CONFIG_MAPPING:
        advice = "semtoken convert makes a SemToken checkpoint of a plain one"
        return Check(GROUP, "configuration", "fault", f"model_type {model_type!r} is no SemToken family", advice)
    config = CONFIG_MAPPING[model_type].from_pretrained(folder)
    found.append(config)
    ratio = f"{config.target_ratio:g} tokens per slot" if config.target_ratio else "no ratio"
    state = "" if config.compression else ", compression off"
    return Check(GROUP, "configuration", "ok", f"{model_type}, {ratio}, {config.segmentation_mode}{state}")


def _check_weights(folder: Path, config: PreTrainedConfig) -> Check:
    model_class = causal_lm_class(config)
    stored = rename_as_loaded(find_tensors(folder), model_class)
    with torch.device("meta"):
        model = model_class(config)  # type: ignore[arg-type]
    expected = model.state_dict()
    # Nothing reads an encoder that is not there.
    unused = config.segmentation_mode == "uniform"
    added = {n: t for n, t in expected.items() if unused and "semantic_encoder." in n and n not in stored}
    check_tensors(model, stored, added)
    found = f"{len(stored)} tensors of the shapes that config.json says"
    if extra := sorted(stored.keys() - expected.keys()):
        return Check(GROUP, "weights", "warning", f"{found}; nothing reads {shortened(extra)}", AGAIN)
    return Check(GROUP, "weights", "ok", found)


def _check_encoder(folder: Path, config: Any) -> Check:
    held = [name for name in find_tensors(folder) if "semantic_encoder." in name]
    kind = config.encoder_config.model_type
    if held:
        dtype, why = _encoder_dtype(config)
        return Check(GROUP, "encoder", "ok", f"{kind}, {len(held)} tensors, runs in {dtype}", why)
    if config.segmentation_mode == "uniform":
        return Check(GROUP, "encoder", "absent", "none", "uniform spans need none")
    found = f"none, and segmentation_mode {config.segmentation_mode!r} needs one"
    return Check(GROUP, "encoder", "fault", found, AGAIN)


def _encoder_dtype(config: Any) -> tuple[str, str]:
    """The dtype that the encoder has on this machine, and why."""
    if config.encoder_config.model_type == SemTokenStaticEncoderConfig.model_type:
        return "float32", "a table is only looked up"
    if config.encoder_dtype != "auto":
        return config.encoder_dtype, "encoder_dtype says so; 'auto' follows the device"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dtype = native_dtype(device or torch.device("cpu"))
    name = device.type if device else "this processor"
    does = "multiplies" if dtype == torch.bfloat16 else "does not multiply"
    return str(dtype).removeprefix("torch."), f"encoder_dtype is 'auto', and {name} {does} bfloat16 natively"


def _check_tokenizer(folder: Path, config: Any) -> Check:
    tokenizer = SemTokenFastTokenizer.from_pretrained(folder)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        found = f"ids up to {highest}, and the model has {config.vocab_size} embeddings"
        return Check(GROUP, "tokenizer", "fault", found, "use the tokenizer that belongs to the model")
    if outside := [i for i in config.protected_token_ids or [] if i >= config.vocab_size]:
        return Check(GROUP, "tokenizer", "fault", f"protected_token_ids {outside[:3]} are no tokens", AGAIN)
    template = "" if tokenizer.chat_template else ", no chat template"
    found = f"{len(tokenizer):,} of {config.vocab_size:,} embeddings{template}"
    if highest + 1 < (1 - PADDING) * config.vocab_size:
        advice = "so many embeddings without a token: the tokenizer may belong to another model"
        return Check(GROUP, "tokenizer", "warning", found, advice)
    return Check(GROUP, "tokenizer", "ok", found)


def _check_adapter(folder: Path, config: Any) -> Check:
    if config.adapter_subfolder is None:
        return Check(GROUP, "adapter", "absent", "none", "the checkpoint needs none")
    if lost := [name for name in ADAPTER_FILES if not (folder / config.adapter_subfolder / name).is_file()]:
        return Check(GROUP, "adapter", "fault", f"{config.adapter_subfolder} lacks {', '.join(lost)}", AGAIN)
    if installed_version("peft") is None:
        return Check(GROUP, "adapter", "fault", "peft is not installed", "pip install 'semtoken-hf[adapt]'")
    return Check(GROUP, "adapter", "ok", config.adapter_subfolder)


def _check_modules(folder: Path) -> Check:
    compared = compare_modules(folder)
    if compared.is_same:
        return Check(GROUP, "modules", "ok", f"{len(compared.same)}, those of this version")
    found = f"{len(compared.same)} as in this version; {compared.describe() or 'no others'}"
    if compared.missing or not (compared.same or compared.changed):
        return Check(GROUP, "modules", "fault", found, AGAIN)
    advice = "of another version, or changed by hand: read them before trust_remote_code, or renew them with --upgrade"
    return Check(GROUP, "modules", "warning", found, advice)


__all__ = ["check_checkpoint", "folder_of"]
