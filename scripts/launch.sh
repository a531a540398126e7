#!/usr/bin/env bash
# torchrun as a long run wants it, one call per node: ./scripts/launch.sh [torchrun options] train.py [overrides]
#
#   ./scripts/launch.sh --nproc-per-node 8 train.py model=contextual_convnext_t data.root=$ROOT run_name=ctx_t
#
# A process that dies is restarted with all others from the last checkpoint (MAX_RESTARTS times, 3 by default).
# SIGTERM, SIGINT and SIGUSR1 reach all processes, which save and end within SHUTDOWN_SECONDS (60).
# Exit status: 0 complete; 75 stopped in order, the same command goes on; 2 a mistake to put right; 1 anything else.
set -uo pipefail

# Without this, restarted processes find the addresses of the dead ones in the agent's store and never meet (torch 2.14)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The processes write their exit status here, as torchrun makes a restart or a 1 of everything that is not 0
CONTEXTUAL_CNN_STATUS_FILE=$(mktemp) || exit 1
export CONTEXTUAL_CNN_STATUS_FILE
trap 'rm -f "$CONTEXTUAL_CNN_STATUS_FILE"' EXIT

set -m # in a process group of its own, torchrun gets a terminal's Ctrl-C once, from us
"${PYTHON:-python}" -m torch.distributed.run \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGHUP \
    --shutdown-timeout "${SHUTDOWN_SECONDS:-60}" \
    "$@" &
torchrun=$!
for name in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064
    trap "kill -$name $torchrun 2>/dev/null" "$name"
done

wait "$torchrun"
status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends `wait`, not torchrun
    wait "$torchrun"
    status=$?
done

written=$(cat "$CONTEXTUAL_CNN_STATUS_FILE")
# After a signal torchrun itself ends with 1, whatever its processes did
if [ "${written:-0}" != 0 ]; then exit "$written"; fi
exit "$status"
