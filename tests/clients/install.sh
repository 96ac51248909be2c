#!/usr/bin/env bash
# Makes an environment for each client that the tests of tests/clients run, 2 GB in all, outside
# this repository:
#
#   tests/clients/install.sh [NAME...]      (default: every file in requirements/)
#
# They lie in LINKER_CLIENTS (default: ~/.cache/linker/clients). One that is there in these very
# versions is left as it is. PYTHON names the interpreter, one that has pip (python3). Some clients
# want torch; where pip is not told of an index of CPU builds yet:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tests/clients/install.sh
set -euo pipefail

requirements=$(cd "$(dirname "$0")" && pwd)/requirements
clients=${LINKER_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/linker/clients}
python=${PYTHON:-python3}

make_environment() { # NAME
    local wanted=$requirements/$1.txt home=$clients/$1 began=$SECONDS
    test -f "$wanted" || { echo "There is no client named $1." >&2; exit 2; }
    if cmp --silent "$wanted" "$home/installed.txt"; then
        return
    fi
    rm -rf "$home"
    "$python" -m venv --without-pip "$home"
    # The files name everything that is needed, so nothing is to be resolved; and most of it is never
    # imported, so nothing is compiled ahead.
    "$python" -m pip --python "$home/bin/python" install --quiet --disable-pip-version-check \
        --no-deps --no-compile --requirement "$wanted"
    cp "$wanted" "$home/installed.txt"
    echo "$1: $((SECONDS - began)) s"
}

mkdir -p "$clients"
test $# -gt 0 || set -- $(cd "$requirements" && ls -- *.txt | sed 's/\.txt$//')
for name in "$@"; do
    make_environment "$name"
done
