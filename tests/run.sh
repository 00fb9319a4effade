#!/usr/bin/env bash
# Sets up what is missing and runs all tests; arguments go to pytest: bash tests/run.sh -k resume -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
exec python -m pytest "$@"
