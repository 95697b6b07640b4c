#!/usr/bin/env bash
# A few prompts through every press of kvpress, on small made-up data: what CI runs of scripts/kvpress_baselines.sh.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
# As in test.sh: the models are tiny.
export OMP_NUM_THREADS=1
data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT
install_once test -c "$constraints" -e "$root[test]"
"$python" -m tests.fixtures.evaluation_data "$data"
options=(
    --checkpoint model_cards/semtoken-llama-tiny --data-dir "$data" --output-dir "$data/evaluation"
    --tasks wikitext needle tables --fraction 0.05 --ratios 2.4 --curve-ratios 2.4 --methods full none semtoken
    --ablations none --context-length 256 --target-length 32 --max-new-tokens 4 --lengths 256
)
"$python" scripts/evaluate.py "${options[@]}"
bash scripts/kvpress_baselines.sh "${options[@]}"
"$python" scripts/evaluate.py "${options[@]}" --report
grep -q "SemToken, then SnapKV" "$data"/evaluation/*/report.html
