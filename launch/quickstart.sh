#!/usr/bin/env bash
# Install, then train a small DCFormer on this machine: see usage below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'USAGE'
Usage: bash launch/quickstart.sh [--new] [--name NAME] [--processes N] [key=value ...]

Creates .venv, turns the Python standard library's source files into token shards, and trains a small DCFormer
with `deepspeed launch/train.py configs/quickstart.yaml`: on all GPUs (or those in CUDA_VISIBLE_DEVICES), or with
2 processes on the CPU (a few minutes on 2 cores). What is already there is reused; an unfinished run
is resumed.

  --new            start another run (quickstart-2, quickstart-3, ...) instead of resuming
  --name NAME      name of the run; its folder is runs/NAME (default: quickstart)
  --processes N    number of processes (default: one per GPU, or 2 on the CPU)
  key=value        any setting, such as train.steps=200 or model.attention=mha (the Transformer baseline)
USAGE
}

name=quickstart new=no processes= settings=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help|-h) usage; exit 0 ;;
        --new) new=yes ;;
        --name|--processes)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            if [ "$1" = --name ]; then name=$2; else processes=$2; fi; shift ;;
        run.name=*) echo "error: '$1': name the run with --name ${1#*=}" >&2; exit 2 ;;
        *=*) settings+=("$1") ;;
        *) echo "error: unknown option '$1'; see bash launch/quickstart.sh --help" >&2; exit 2 ;;
    esac
    shift
done
[[ "$name" =~ ^[A-Za-z0-9._-]+$ ]] || { echo "error: --name '$name': use letters, digits, '.', '_' and '-'" >&2; exit 2; }
[[ -z "$processes" || "$processes" =~ ^[1-9][0-9]*$ ]] || { echo "error: --processes '$processes' is not a number above 0" >&2; exit 2; }

# Adds a setting unless it is given: train.py refuses a key that is given twice.
default() {
    local given
    for given in "${settings[@]}"; do [[ "$given" != "${1%%=*}="* ]] || return 0; done
    settings=("$1" "${settings[@]}")
}
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/3  Installation"
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
echo "in .venv"

say "2/3  Data: the source files of the Python standard library"
data=runs/data/python-stdlib
if [ -f "$data/train/manifest.json" ] && [ -f "$data/validation/manifest.json" ]; then
    echo "already in $data"
else
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    python tools/make_shards.py "$stdlib" --suffix .py --exclude site-packages --on-bad-row skip --workers 1 \
        --tokenizer byte --hold-out 0.02 --shard-tokens 2000000 --output "$data"
fi

say "3/3  Training"
if [ "$new" = yes ]; then
    base=$name number=2
    while [ -e "runs/$name" ]; do name=$base-$number; number=$((number + 1)); done
fi
run=runs/$name
if python - "$run" <<'PYTHON'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
summary = run / "summary.json"
result = json.loads(summary.read_text()) if summary.exists() else {}
if result.get("completed"):
    from dcscale.train.summary import summary_lines
    print(f"{run} is complete:", *summary_lines(result), sep="\n")
    sys.exit(0)
if (run / "checkpoints").exists():
    print(f"{run} is unfinished: resuming from its newest checkpoint.")
sys.exit(1)
PYTHON
then
    if [ ${#settings[@]} -gt 0 ]; then
        printf 'Ignored, because the run is complete:'; printf ' %s' "${settings[@]}"; echo
    fi
    printf 'Start another run with:'; printf ' %q' bash launch/quickstart.sh --name "$name" --new "${settings[@]}"; echo
else
    gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
    if [ "$gpus" -gt 0 ]; then
        processes=${processes:-$gpus}
        [ "$processes" -le "$gpus" ] || { echo "error: --processes $processes, but there are $gpus GPUs" >&2; exit 2; }
        default train.precision=bf16
    else
        processes=${processes:-2}
        export DS_ACCELERATOR=cpu  # no warning from DeepSpeed that it found no GPU
    fi
    # configs/quickstart.yaml has 4 sequences for each of 2 processes; keep 4 per process with more of them.
    [ "$processes" -le 2 ] || default "train.global_batch_size=$((4 * processes))"
    # With a number of processes, deepspeed ignores CUDA_VISIBLE_DEVICES, and --include takes indices only, no UUIDs.
    visible=$(printf %s "${CUDA_VISIBLE_DEVICES:-}" | tr -d ' ' | cut -d, -f "1-$processes")
    if [ "$gpus" -eq 0 ] || [ -z "$visible" ]; then
        launcher=(deepspeed --quiet --num_accelerators "$processes")
    elif [[ "$visible" =~ ^[0-9,]+$ ]]; then
        launcher=(env -u CUDA_VISIBLE_DEVICES deepspeed --quiet --include "localhost:$visible")
    else
        launcher=(torchrun --standalone --nproc-per-node "$processes")
    fi
    # The run is a process group of its own, to which this script forwards signals as INT. The deepspeed command would
    # die immediately of any signal, so it ignores INT and waits for its launcher, which waits for the last checkpoint.
    set -m
    (trap '' INT; exec "${launcher[@]}" launch/train.py configs/quickstart.yaml "run.name=$name" "${settings[@]}") &
    set +m
    group=$! status=0
    trap 'kill -INT -- "-$group" || true' INT TERM HUP
    wait "$group" || status=$?
    while kill -0 "$group" 2>/dev/null; do wait "$group" || status=$?; done
    trap - INT TERM HUP
    if [ "$status" -ne 0 ]; then
        if [ -e "$run/checkpoints/latest" ]; then
            echo "The same command resumes from $run/checkpoints/$(cat "$run/checkpoints/latest")."
        fi
        exit "$status"
    fi
fi

say "Next"
cat <<NEXT
  look at the curves      .venv/bin/tensorboard --logdir runs          (then open the address it prints)
  generate text           .venv/bin/python tools/generate.py $run --prompt "def "
  the baseline            bash launch/quickstart.sh --name baseline model.attention=mha
  your own text           see README.md, "Train on your own data"
NEXT
