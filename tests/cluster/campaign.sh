#!/usr/bin/env bash
# The fault campaign: every row several times with ZeRO-2 and 3 on SLURMs of two nodes on this machine, as root. Results
# are appended to runs/campaign/results.jsonl; the table in launch/README.md is written from those of the current commit.
# It can be interrupted; the same command does what is left.
#   campaign.sh                    every row 3 times with each stage; about an hour on 2 cores
#   campaign.sh sigstop nan -n 1   these rows, once with each stage;  --zero 2  with one stage;  -j 3  on three clusters
#   campaign.sh --again ...        also what was done for this commit already;  --table  only the table
#   campaign.sh --help             names of the rows
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" OMP_NUM_THREADS=1
exec python tests/cluster/campaign.py "$@"
