#!/usr/bin/env bash
# Everything worth learning from a GPU in under ten minutes: is it correct, does the model behind its design hold and
# what should change (first_look), how fast is it, and why. Each stage has a time limit and a log in $OUT; the next one
# runs whether it succeeds or fails. STAGES="facts tests" runs some of them; counters and tune run only so.
set -uo pipefail
out=${OUT:-gpu-out}; mkdir -p "$out"
export SCRATCH; SCRATCH=$(mktemp -d)  # packages, caches, shards and runs that nobody needs afterwards
stages=${STAGES:-facts tests first_look attention train profile}
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SCRATCH/site" .whl/*.whl
fi
export PYTHONPATH=$SCRATCH/site:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=$SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor
began=$SECONDS
stage() {  # name limit command...
    local name=$1 limit=$2; shift 2
    [[ " $stages " == *" $name "* ]] || return 0
    printf '\n=== %s (at %d s, limit %d s)\n' "$name" $((SECONDS - began)) "$limit"
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1; local status=$?
    tail -n "${LINES_OF_LOG:-25}" "$out/$name.log"; printf '=== %s ended with %d after %d s in all\n' "$name" $status $((SECONDS - began))
}
facts() { nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader; python3 -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_capability())'; }
export -f facts
data() {  # token shards of the standard library's sources: seconds
    [ -f $SCRATCH/shards/train/manifest.json ] || python3 tools/make_shards.py "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
        --suffix .py --exclude site-packages dist-packages --on-bad-row skip --tokenizer byte --hold-out 0.02 --shard-tokens 2000000 --output $SCRATCH/shards
}
train() {  # a step of the 405M shape, composed and plain, at 2048 and 8192 tokens
    data || return 1
    for length in ${LENGTHS:-2048 8192}; do for attention in dcmha mha; do
        echo "--- 405M $attention, $length tokens"
        timeout -k 5 35 python3 launch/train.py configs/model/dcformer-405m.yaml configs/train/405m.yaml data.train=$SCRATCH/shards/train model.vocab_size=50304 \
            model.attention=$attention data.sequence_length=$length data.validation=null validation.interval=0 train.steps=30 schedule.warmup_steps=5 train.global_batch_size=$((65536 / length)) \
            train.micro_batch_size=$((16384 / length)) train.compile="${COMPILE:-false}" train.recompute=none samples.interval=0 checkpoint.interval=0 log.interval=10 \
            log.compose_interval=0 log.progress=false run.folder=$SCRATCH/runs/$attention-$length 2>&1 | grep -vi warn | tail -n 12
        tail -n 1 $SCRATCH/runs/$attention-$length/metrics.jsonl
    done; done
}
profile() { python3 .gpu/profile_step.py; }
counters() {  # why each kernel is as fast as it is: stalls, issue slots, cache and memory rates
    local ncu; ncu=$(command -v ncu || ls -d /opt/nvidia/nsight-compute/*/ncu | tail -n 1) || return 1
    local sections=(SpeedOfLight WarpStateStats SchedulerStats Occupancy LaunchStats MemoryWorkloadAnalysis ComputeWorkloadAnalysis InstructionStats)
    "$ncu" --clock-control none --profile-from-start off --kernel-name 'regex:compose_|multiply_' "${sections[@]/#/--section=}" \
        --page details --csv --log-file "$out/counters.csv" python3 .gpu/one_pass.py
    grep -c Duration "$out/counters.csv"
}
export out; export -f data train profile counters
stage facts 20 bash -c facts
stage tests 120 python3 -m pytest -q -n 12 --maxfail=8 -p no:cacheprovider tests/ops/compose tests/models/test_triton_training.py -k "triton and not aot and not tune"
stage first_look 150 python3 tools/bench_attention.py --first-look --minutes 2.3 --output "$out/first-look.json"
stage attention 100 python3 tools/bench_attention.py --quick --minutes 1.4 --output "$out/attention.json"
stage train 150 bash -c train
stage profile 45 bash -c profile
stage counters 60 bash -c counters
stage tune 90 bash -c 'python3 -m dcscale.ops.compose.triton.tune --heads 32 --head-dim 128 --length 4096; python3 -m dcscale.ops.compose.triton.tune --heads 32 --head-dim 128 --length 4096 --window 256'
