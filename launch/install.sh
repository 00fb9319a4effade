#!/usr/bin/env bash
# Creates .venv in the repository with dcscale and pinned packages; does nothing if it is up to date.
# Used by launch/quickstart.sh and tests/run.sh. Usage: bash launch/install.sh [EXTRAS]   (EXTRAS such as "test")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
stamp=.venv/installed-$extras

say() { printf '\033[1m%s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Fingerprint of everything that determines what is installed.
wanted=$(cat pyproject.toml launch/constraints.txt launch/install.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
    done
fi
[ -n "$python" ] || die "no Python 3.10 or newer was found; install one or set PYTHON=/path/to/python"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "Creating .venv with $("$python" --version)"
    was_there=no
    [ ! -e .venv ] || was_there=yes
    if ! "$python" -m venv .venv; then
        [ "$was_there" = yes ] || rm -rf .venv
        die "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv (and remove .venv if it is still there)"
    fi
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile)

# Writes the bytecode of packages on all cores; pip would on one, and for parts that nobody imports too. What is left out,
# Python compiles when it is imported. An error is no failure: some packages have templates that are not valid Python.
compile() { .venv/bin/python -m compileall -q -j 0 -x '/(pip|transformers/models|testing|tests?)/' "$@" >/dev/null || true; }

version=$(sed -n 's/^torch==//p' launch/constraints.txt)
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        say "Installing torch $version for NVIDIA GPUs (several GB)"
        "${pip[@]}" "torch==$version"
    else
        say "Installing torch $version for the CPU (about 200 MB)"
        # The +cpu version has no CUDA: requesting it can never download CUDA packages.
        first=$("${pip[@]}" "torch==$version+cpu" 2>&1) \
            || "${pip[@]}" "torch==$version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu \
            || die "torch could not be installed; without PyTorch's own index, pip printed: $first"
    fi
fi
say "Installing dcscale and its packages"
compile .venv/lib/python*/site-packages/torch &  # while pip, on one core, installs the others
compiling=$!
"${pip[@]}" --constraint launch/constraints.txt --editable ".${extras:+[$extras]}"
wait $compiling
compile .venv/lib

printf '%s\n' "$wanted" > "$stamp"
