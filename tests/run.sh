#!/usr/bin/env bash
# Install what is missing, check the style, run all tests, a file at a time in each of some processes. Arguments go to
# pytest, and then nothing else is done: bash tests/run.sh -k resume -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi

ruff check .
ruff format --check .

logs=runs/tests
mkdir -p "$logs"
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # nproc heeds the variables
status=0
# One process more than cores, since many tests wait. Files are taken in the order that tests/conftest.py gives them.
python -m pytest -n $((cores < 8 ? cores + 1 : 8)) --dist loadfile --no-loadscope-reorder --durations=0 --durations-min=0.5 2>&1 \
    | tee "$logs/pytest.log" | grep -vE '^[0-9.]+s (call|setup|teardown) ' || status=1
grep -E '^[0-9.]+s (call|setup|teardown) ' "$logs/pytest.log" | sort -rn > "$logs/durations.txt" || true
echo "Durations above 0.5 s, slowest first: $logs/durations.txt"
tail -n 1 "$logs/pytest.log"
exit $status
