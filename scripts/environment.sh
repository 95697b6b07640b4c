# Sourced by quickstart.sh and test.sh: sets $root and $python, a virtual environment with this package in it.
# TRANSFORMERS_VERSION picks another release than the pinned one; PYTHON another interpreter (3.11 or later).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

pinned=$(sed -n 's/^transformers==//p' "$root/constraints.txt")
version=${TRANSFORMERS_VERSION:-$pinned}
venv=$root/.venv
if [ "$version" != "$pinned" ]; then venv=$venv-$version; fi
python=$venv/bin/python
constraints=$venv/constraints.txt

# install_once NAME ARGUMENTS...: pip install, unless the same install has succeeded here before.
install_once() {
    local stamp=$venv/$1.installed
    shift
    if [ "$stamp" -nt "$root/pyproject.toml" ] && [ "$stamp" -nt "$root/constraints.txt" ]; then return; fi
    echo "installing into $venv: $*" >&2
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
    touch "$stamp"
}

# make_venv INTERPRETER: the environment $venv, unless it is there and whole.
make_venv() {
    if "$python" -m pip --version >/dev/null 2>&1; then return; fi
    rm -rf "$venv"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: set PYTHON")'
    "$1" -m venv "$venv"
}

make_venv "${PYTHON:-python3}"
cp "$root/constraints.txt" "$constraints"
if [ "$version" != "$pinned" ]; then
    # Another release of Transformers brings its own needs.
    grep -vE '^(transformers|tokenizers|huggingface-hub|safetensors|accelerate)==' "$root/constraints.txt" >"$constraints"
    echo "transformers==$version" >>"$constraints"
fi
install_once package -c "$constraints" -e "$root"
