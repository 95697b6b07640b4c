#!/usr/bin/env python
"""Adapt a converted checkpoint to its merged slots by distillation; kill it and start it again to resume.

    python scripts/adapt.py --checkpoint model_cards/semtoken-llama-tiny --text corpus --output_dir runs/adapt
    python scripts/adapt.py --checkpoint my-semtoken --text Salesforce/wikitext --text_config wikitext-103-raw-v1 \\
        --trainable full --max_steps 1000 --output_dir runs/adapt-full
    accelerate launch scripts/adapt.py --checkpoint my-semtoken --text corpus --output_dir runs/adapt     # GPUs

The adapted checkpoint is `OUTPUT_DIR/model`; `curve.csv` and `curve.png` beside it show how the cost fell.
"""

from transformers import HfArgumentParser

from semtoken_hf.training.adaptation import adapt
from semtoken_hf.training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments

if __name__ == "__main__":
    parser = HfArgumentParser((AdaptationArguments, AdaptationTrainingArguments))  # type: ignore[arg-type]
    arguments, training = parser.parse_args_into_dataclasses()
    print(adapt(arguments, training))
