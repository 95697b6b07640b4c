#!/usr/bin/env python
"""Train a small plain Llama on a folder of text; kill it and start it again with the same command to resume.

    python scripts/train_reference.py --text-folder corpus --output-dir runs/reference --steps 2000
    accelerate launch scripts/train_reference.py --text-folder corpus --output-dir runs/reference   # GPUs

Every field of `semtoken_hf.training.reference.ReferenceConfig` is an option; files are weighted by
`--weights wiki.txt.xz=4 novels.txt.xz=0.5`.
"""

from semtoken_hf.evaluation.option_names import DataclassParser
from semtoken_hf.training.reference import ReferenceConfig, ReferenceTrainer

if __name__ == "__main__":
    (config,) = DataclassParser(ReferenceConfig).parse_args_into_dataclasses()  # type: ignore[arg-type]
    print(ReferenceTrainer(config).train())
