#!/usr/bin/env bash
# Everything that only a GPU can show, as JSON, in less than eight minutes: ./scripts/dev/gpu_check.sh FOLDER
#
# Needs a python ($PYTHON, else python3) with torch, triton and timm; this checkout need not be installed.
# The order is that of importance: whatever is cut off at the end is the least missed. A part that takes too long is ended;
# its file then holds what was finished, and "incomplete": true.
set -uo pipefail
folder=$(realpath -m "${1:?usage: gpu_check.sh FOLDER}")
cd "$(dirname "$0")/../.."
mkdir -p "$folder"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
batch_sizes=${BATCH_SIZES:-"128 64 256"}
limit=${LIMIT:-240} # seconds for each part
failed=0

run() { # name, command ...
    local name=$1
    shift
    echo "== $name" >&2
    timeout --kill-after=10 "$limit" "$python" "$@" --device "$device" --output "$folder/$name.json" > "$folder/$name.log" 2>&1
    case $? in
        0) return ;;
        124 | 137) echo "   incomplete after $limit s, $folder/$name.json has what was finished" >&2 ;;
        *) echo "   failed, see $folder/$name.log" >&2 ;;
    esac
    failed=1
}

run checks scripts/dev/gpu_check.py ${QUICK:+--quick}
first_batch=${batch_sizes%% *}
run "op-b$first_batch" scripts/dev/benchmark.py op --batch-size "$first_batch" --rounds 20
run "model-tiny-b$first_batch" scripts/dev/benchmark.py model --model tiny --batch-size "$first_batch" --compile --rounds 20
run loss scripts/dev/benchmark.py loss --batch-size "$first_batch" --rounds 20
run "table1-tiny-b$first_batch" scripts/dev/benchmark.py table1 --model tiny --batch-size "$first_batch" --compile --rounds 10
for model in small base; do
    run "model-$model-b$first_batch" scripts/dev/benchmark.py model --model "$model" --batch-size "$first_batch" --compile --rounds 10
done
for batch in ${batch_sizes#"$first_batch"}; do
    run "model-tiny-b$batch" scripts/dev/benchmark.py model --model tiny --batch-size "$batch" --compile --rounds 10
done
exit $failed
