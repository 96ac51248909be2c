#!/usr/bin/env bash
# Makes an environment for each client that the tests of tests/clients run, 1 GB in all, outside
# this repository:
#
#   tests/clients/install.sh [NAME...]      (default: all of them)
#
# They lie in LINKER_CLIENTS (default: ~/.cache/linker/clients). One that is there in these very
# versions is left as it is. PYTHON names the interpreter (python3).
set -euo pipefail

clients=${LINKER_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/linker/clients}
python=${PYTHON:-python3}

requirements() { # NAME
    case $1 in
        openai2) echo 'openai==2.54.0' ;;
        openai3) echo 'openai==3.54.0' ;;
        langchain) echo 'langchain-openai==1.7.0 langchain-core==1.7.2' ;;
        litellm) echo 'litellm==1.104.0' ;;
        guidellm) echo 'guidellm==0.8.1 torch==2.13.0 transformers==5.23.0' ;;
        *) echo "There is no client named $1." >&2; return 2 ;;
    esac
}

make_environment() { # NAME
    local home=$clients/$1 wanted began=$SECONDS
    wanted=$(requirements "$1")
    if [ "$(cat "$home/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    test -x "$home/bin/python" || "$python" -m venv "$home"
    # shellcheck disable=SC2086 - several requirements
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check $wanted
    echo "$wanted" > "$home/.installed"
    echo "$1: $((SECONDS - began)) s"
}

mkdir -p "$clients"
test $# -gt 0 || set -- openai2 openai3 langchain litellm guidellm
for name in "$@"; do
    make_environment "$name"
done
