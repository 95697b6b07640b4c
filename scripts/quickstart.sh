#!/usr/bin/env bash
# The main job on the embedded checkpoint: a chapter read with and without compression, side by side.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" "$root/scripts/quickstart.py" "$@"
