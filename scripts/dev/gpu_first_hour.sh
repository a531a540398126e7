#!/usr/bin/env bash
# The first hour on a node with GPUs, as one command: ROOT=/path/to/imagenet ./scripts/dev/gpu_first_hour.sh OUT
#
# The cheapest and most decisive first. Each step has a log of its own in OUT and a limit of time; a failure does not stop
# the next. OUT/summary has a line for each: its status, the one that is expected, and seconds. Ends with 1 if one differs.
#   N=8       processes; the GPUs of this node, unless it is set
#   --cpu     the same on small pictures of noise, two processes and a CPU: to check the list itself
# How to read it: docs/cluster.md. Kernels and speed: scripts/dev/gpu_check.py.
set -uo pipefail
out=$(realpath -m "${1:?usage: gpu_first_hour.sh OUT [--cpu]}")
cd "$(dirname "$0")/../.."
mkdir -p "$out"
: >"$out/summary"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHON=${PYTHON:-python} PYTHONUNBUFFERED=1
wrong=0

step() { # name, seconds, expected status, command ...
    local name=$1 limit=$2 expected=$3 started=$SECONDS status
    shift 3
    timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: status $status, $((SECONDS - started)) s$([ "$status" = "$expected" ] || echo "  <- expected $expected")" |
        tee -a "$out/summary"
    [ "$status" = "$expected" ] || wrong=1
}

if [ "${2:-}" = --cpu ]; then
    device=cpu N=${N:-2} ROOT=$out/images
    export OMP_NUM_THREADS=1
    size=(model=contextual_convnext_atto data.image_size=32 data.threads=1 data.eval_batch_size=16)
    run=(trainer.device=cpu trainer.global_batch_size=16 trainer.micro_batch_size=8 trainer.log_every=2)
    noise=(data.root=none data.layout=synthetic data.limit=64)
    numbers=(--numbers 1000000)
    compiled=() # Inductor takes minutes on a CPU
    "$PYTHON" - "$ROOT" <<'PYTHON'
import sys
from pathlib import Path
sys.path.insert(0, "scripts/dev")
from check_dali import write_images
write_images(Path(sys.argv[1]), 64, classes=5)
PYTHON
    size+=("model.class_counts=null" "model.timm_options={depths: [1, 1, 2, 1]}")
    real=(trainer.max_steps=8)
else
    device=cuda N=${N:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
    : "${ROOT:?ROOT=/path/to/imagenet}"
    size=(model=contextual_convnext_t)
    run=(trainer.global_batch_size=$((128 * N)) trainer.log_every=5)
    noise=(data.root=none data.layout=synthetic data.limit=8192 trainer.compile=false)
    numbers=()
    compiled=(trainer.compile=true)
    real=(trainer.global_batch_size=$((128 * N)) trainer.compile=true trainer.max_steps=150 trainer.log_every=10)
fi
train=(train.py "${size[@]}" "${run[@]}" logger=local output_dir="$out/runs")
torchrun=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$N")
launch=(./scripts/launch.sh --standalone --nproc-per-node "$N")

# The machine: driver, architectures, cores, shared memory
step machine 60 0 bash -c 'nvidia-smi; nvidia-smi topo -m; df -h /dev/shm; taskset -pc $$; true'
step doctor 120 0 "$PYTHON" scripts/doctor.py

# DALI's graph beside the CPU's
step dali 360 0 "$PYTHON" scripts/dev/check_dali.py --device $device --output "$out/dali.jsonl"

# One process: steps, evaluation, checkpoint, resume, another memory format
step one 300 0 "$PYTHON" "${train[@]}" "${noise[@]}" run_name=one trainer.max_steps=8
step resume 300 0 "$PYTHON" "${train[@]}" "${noise[@]}" run_name=one trainer.max_steps=12
step memory_format 300 0 "$PYTHON" "${train[@]}" "${noise[@]}" run_name=one trainer.max_steps=14 trainer.channels_last=false
step dry_run 300 0 "$PYTHON" "${train[@]}" data.root="$ROOT" run_name=dry trainer.dry_run=true

# Collectives, and a lost process: a mistake is noticed in seconds, the rest after half a minute
step collectives 180 0 "${torchrun[@]}" scripts/dev/check_collectives.py --device $device "${numbers[@]}"
if [ "$N" -gt 1 ]; then
    for how in mistake kill exit hang; do
        step "lose_$how" 240 1 "${torchrun[@]}" scripts/dev/check_collectives.py --device $device "${numbers[@]}" --lose $how
    done
fi

# All processes: eager, compiled, and a stop by a signal
step processes 300 0 "${launch[@]}" "${train[@]}" "${noise[@]}" run_name=processes trainer.max_steps=12
if [ ${#compiled[@]} -gt 0 ]; then
    step compiled 900 0 env TORCH_LOGS=recompiles,graph_breaks \
        "${launch[@]}" "${train[@]}" "${noise[@]/trainer.compile=false/${compiled[0]}}" run_name=compiled trainer.max_steps=12
fi
step stop 300 75 bash -c '"$@" & launcher=$!
    until grep -q "^epoch 1 step " "$0" || ! kill -0 $launcher; do sleep 0.2; done
    kill -USR1 $launcher; wait $launcher; status=$?
    while kill -0 $launcher 2>/dev/null; do wait $launcher; status=$?; done; exit $status' \
    "$out/stop.log" "${launch[@]}" "${train[@]}" "${noise[@]}" run_name=stop

# Real images, then the evaluation alone: is it the training's?
step real 900 0 "${launch[@]}" "${train[@]}" data.root="$ROOT" run_name=real "${real[@]}"
step evaluate 600 0 "${launch[@]}" evaluate.py checkpoint="$out/runs/real" device=$device

# The other scripts, and the tests that need a GPU
image=$(find "$ROOT/val" -type f | head -n 1)
step predict 120 0 "$PYTHON" scripts/model/predict.py "$image" --checkpoint "$out/runs/real" --output "$out/prediction.png" \
    --device $device
step analyze 300 0 "$PYTHON" scripts/analysis/analyze.py gradcam embeddings sampling weights shortlist recall \
    --checkpoint "$out/runs/real" --stage 3 --output "$out/figures" --device $device
step export 300 0 "$PYTHON" scripts/model/export.py --checkpoint "$out/runs/real" --format torch_export --output "$out/export"
step tests 900 0 env TEST_GPU=$device "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests

exit $wrong
