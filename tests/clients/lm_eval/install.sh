#!/usr/bin/env bash
# Makes the environment of lm-eval that its tests run in, 2 GB, outside this repository:
#
#   tests/clients/lm_eval/install.sh [DIRECTORY]      (default: ~/.cache/linker/clients/lm_eval)
#
# It has the API client that `linker eval` uses and, to compare with, lm-eval's own way of running a
# model in its process, which wants torch's CPU build, which PyPI does not have. Where pip is not told
# of its index yet:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tests/clients/lm_eval/install.sh
#
# PYTHON names the interpreter (python3). An environment that is there is used as it is.
set -euo pipefail

home=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/linker/clients/lm_eval}
python=${PYTHON:-python3}

if ! "$home/bin/python" -c 'import lm_eval, torch' 2>/dev/null; then
    "$python" -m venv "$home"
    # Never a range: a newer torch from PyPI brings gigabytes of CUDA.
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check \
        'torch==2.13.0+cpu' 'transformers==5.23.0' 'accelerate==1.15.0' 'lm_eval[api]==0.4.13'
fi
echo "lm-eval is in $home."
