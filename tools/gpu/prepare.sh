#!/usr/bin/env bash
# Prepare a checkout for a GPU machine that has Python 3.12, torch 2.11, Triton 3.6 and no network:
# .whl/ gets the wheels which that machine lacks, .gpu/ a copy of this folder. Git ignores both.
# Usage, from the project's root:  bash tools/gpu/prepare.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f pyproject.toml ] || { echo "error: run this from the project's root" >&2; exit 2; }
for name in /.whl/ /.gpu/; do grep -qxF "$name" .git/info/exclude 2>/dev/null || echo "$name" >> .git/info/exclude; done
rm -rf .gpu && mkdir -p .whl .gpu && cp "$here"/*.sh "$here"/*.py .gpu/ 2>/dev/null || true
pin() { sed -n "s/^$1==\([^;]*\).*/$1==\1/p" launch/constraints.txt | head -1; }
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any)
python=.venv/bin/python; [ -x $python ] || python=python3
ls .whl/omegaconf-*.whl >/dev/null 2>&1 || $python -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d .whl "$(pin omegaconf)" "$(pin webdataset)" "$(pin braceexpand)" msgpack pydantic pydantic_core annotated_types typing_inspection
# DeepSpeed and hjson have no wheels of their own; without its C++ operators DeepSpeed is plain Python.
ls .whl/deepspeed-*.whl >/dev/null 2>&1 || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $python -m pip wheel -qq --no-deps --no-build-isolation -w .whl "$(pin deepspeed)" hjson
# pydantic wants exactly the pydantic_core that it names.
core=$(unzip -p .whl/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([^ ;]*\).*/\1/p')
ls .whl/pydantic_core-"$core"-*.whl >/dev/null 2>&1 || { rm -f .whl/pydantic_core-*; $python -m pip download -qq --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" -d .whl "pydantic_core==$core"; }
du -sh .whl | cut -f1
echo "Ready: on the machine with the GPU, in a copy of this folder with .whl and .gpu, run  bash .gpu/day.sh"
echo "Its stages and their time limits are at the end of .gpu/day.sh; STAGES=\"facts tests\" runs some of them. Logs and results go to \$OUT."
