# Sourced by quickstart.sh and test.sh: sets $python to a virtual environment with this package in it.
# TRANSFORMERS_VERSION picks another release than the pinned one; PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pinned=$(sed -n 's/^transformers==//p' constraints.txt)
version=${TRANSFORMERS_VERSION:-$pinned}
venv=.venv
if [ "$version" != "$pinned" ]; then venv=.venv-$version; fi
python=$venv/bin/python
constraints=$venv/constraints.txt

# install_once NAME ARGUMENTS...: pip install, unless the same install has succeeded here before.
install_once() {
    local stamp=$venv/$1.installed
    shift
    if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then return; fi
    echo "installing into $venv: $*"
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
    touch "$stamp"
}

if [ ! -x "$python" ]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
# Only the release of Transformers differs between the two environments; its own needs decide the rest.
if [ "$version" = "$pinned" ]; then
    cp constraints.txt "$constraints"
else
    printf 'transformers==%s\n' "$version" >"$constraints"
    grep '^torch==' constraints.txt >>"$constraints"
fi
install_once package -c "$constraints" -e .
