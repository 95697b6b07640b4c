#!/usr/bin/env bash
# Runs the recipes of docs/training_with_trl.md with the TRL that constraints.txt names; arguments go to pytest.
#   bash scripts/trl_recipes.sh -k grpo
# TRL is no need of the package: it gets an environment of its own, .venv-trl.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ours=$python

# From here on, install_once installs for TRL.
venv=$root/.venv-trl
python=$venv/bin/python
make_venv "$ours"
install_once trl -c "$constraints" trl pytest -e "$root[adapt]"

cd "$root"
# The models are tiny: more threads only wait for each other.
OMP_NUM_THREADS=1 exec "$python" -m pytest tests/training/test_trl.py "$@"
