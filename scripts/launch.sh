#!/usr/bin/env bash
# torchrun as a long run wants it, one call per node: ./scripts/launch.sh [torchrun options] train.py [overrides]
#
#   ./scripts/launch.sh --nproc-per-node 8 train.py model=contextual_convnext_t data.root=$ROOT run_name=ctx_t
#
# A process that dies is restarted with all others from the last checkpoint (MAX_RESTARTS times, 3 by default).
# SIGTERM, SIGINT, SIGUSR1 and SIGHUP reach all processes, which save and end within SHUTDOWN_SECONDS (60).
# Exit status: 0 complete; 75 stopped, the same command goes on; 2 a mistake to put right; 1 anything else.
set -uo pipefail

# Every signal is passed on once to each process; a restart may be under way, and then to those that come up later
signal='' since='' told=' ' torchrun=''
for name in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064
    trap "signal=$name since=\${since:-\$SECONDS} told=' '" "$name"
done

# The processes themselves are told, and not torchrun: one that is told leaves those on the other nodes waiting for it
pass_on() {
    local worker workers
    workers=$(cat "/proc/$torchrun/task/$torchrun/children")
    for worker in $workers; do
        if cmp -s "/proc/$worker/cmdline" "/proc/$torchrun/cmdline"; then continue; fi # forked, and would lose it
        [[ $told == *" $worker "* ]] || kill -"$signal" "$worker"
        told+="$worker "
    done
    if [ "$told" = ' ' ]; then kill -TERM "$torchrun"; fi # it has not started any, so there is nothing to save
    # shellcheck disable=SC2086
    if [ $((SECONDS - since)) -ge "${SHUTDOWN_SECONDS:-60}" ]; then kill -KILL "$torchrun" $workers; fi
} 2>/dev/null

# Without this, restarted processes find the addresses of the dead ones in the agent's store and never meet (torch 2.14)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The processes write their exit status here, as torchrun makes a restart or a 1 of everything that is not 0
CONTEXTUAL_CNN_STATUS_FILE=$(mktemp) || exit 1
export CONTEXTUAL_CNN_STATUS_FILE
trap 'rm -f "$CONTEXTUAL_CNN_STATUS_FILE"' EXIT

# Compiled kernels belong on the node's own disk, and not in a home that all nodes share; only where nobody else writes
cache=${TMPDIR:-/tmp}/contextual_cnn_$UID
if mkdir -p -m 700 "$cache" 2>/dev/null && [ -O "$cache" ] && [ ! -L "$cache" ]; then
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
fi

set -m # in a process group of its own, torchrun gets a terminal's Ctrl-C from nobody but us
# After 60 s without an answer torchrun would end a run whose processes bear an outage for trainer.timeout_minutes
"${PYTHON:-python}" -m torch.distributed.run \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-conf read_timeout=600 \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGHUP \
    --shutdown-timeout "${SHUTDOWN_SECONDS:-60}" \
    "$@" & # a scheduler may tell torchrun too
torchrun=$!
while kill -0 "$torchrun" 2>/dev/null; do
    if [ -n "$signal" ]; then pass_on; fi
    sleep 0.5 </dev/null >/dev/null 2>&1 &
    wait $! # ends early when a signal comes
done
wait "$torchrun"
status=$?

written=$(cat "$CONTEXTUAL_CNN_STATUS_FILE")
if [ "${written:-0}" != 0 ]; then exit "$written"; fi
if [ -n "$signal" ] && [ "$status" != 0 ]; then exit 75; fi # it came before the processes were able to write theirs
if [ "$status" != 0 ] && [[ " $*" == *" --rdzv-endpoint"* ]]; then # torchrun's own last words are a traceback
    echo "error: torchrun has ended with status $status on $HOSTNAME; what comes before says why, and \"C10d store has" \
        "failed\" is a node of the rendezvous that is gone or out of reach" >&2
    echo "  fix: the same command on every node resumes" >&2
fi
exit "$status"
