#!/usr/bin/env bash
# Runs the tests of `semtoken compress-dataset --engine ray` on a local Ray of two workers; arguments go to pytest.
#   bash scripts/ray_test.sh
# Ray (240 MB) is no need of the tests: it gets an environment of its own, .venv-ray.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ours=$python

# From here on, install_once installs for Ray.
venv=$root/.venv-ray
python=$venv/bin/python
make_venv "$ours"
install_once ray -c "$constraints" pytest -e "$root[ray]"

cd "$root"
OMP_NUM_THREADS=1 exec "$python" -m pytest tests/bulk/test_ray.py "$@"
