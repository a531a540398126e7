#!/usr/bin/env bash
# A fresh clone to a passed test suite: ./scripts/test.sh [--fast|--slow] [pytest arguments]
#
#   (none)   lint, format, spelling, types, import contract, and every test but the slow proofs
#   --fast   the same checks, and the tests that start no run of their own: after each change
#   --slow   the slow proofs alone
set -euo pipefail
. "$(dirname "$0")/environment.sh"

chosen="not slow"
case ${1:-} in
    --fast) chosen="not slow and not run" && shift ;;
    --slow) chosen="slow" && shift ;;
esac

part() { # name, command ...
    local name=$1 started=$SECONDS
    shift
    "$@"
    echo "== $name: $((SECONDS - started)) s"
}

bin=$(dirname "$PYTHON")
if [ "$chosen" != slow ]; then
    part lint "$PYTHON" -m ruff check .
    part format "$PYTHON" -m ruff format --check .
    part spelling "$bin/codespell"
    part types "$PYTHON" -m mypy
    part "import contract" "$bin/lint-imports"
fi
# Of a whole suite a file's tests stay together, and share the runs that they look at
workers=(-n 2 --dist loadfile)
[ $# = 0 ] || workers=()
exec "$PYTHON" -m pytest -m "$chosen" "${workers[@]}" "$@"
