#!/usr/bin/env bash
# Sets up what is missing, checks the style and runs all tests. Arguments go to pytest, and then the style is not
# checked: bash tests/run.sh -k resume -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
fi
exec python -m pytest "$@"
