#!/usr/bin/env bash
# The presses of kvpress, alone and behind SemToken, as cells of an evaluation; the arguments are those of evaluate.py.
#   bash scripts/kvpress_baselines.sh --checkpoint model_cards/semtoken-llama-tiny --data-dir data --workers 2
#   python scripts/evaluate.py ...the same arguments... --report    # the report shows them
# kvpress needs an older Transformers than this package: it gets an environment of its own, .venv-kvpress.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_once evaluate -c "$constraints" -e "$root[evaluate]"
ours=$python

# From here on, install_once installs for kvpress.
venv=$root/.venv-kvpress
python=$venv/bin/python
make_venv "$ours"
install_once kvpress "$(grep '^torch==' "$root/constraints.txt")" transformers==5.2.0 kvpress==0.5.5

folder=$("$ours" "$root/scripts/kvpress_exchange.py" export "$@" | tail -n 1)
"$python" "$root/scripts/kvpress_run.py" "$folder"
exec "$ours" "$root/scripts/kvpress_exchange.py" import "$@"
