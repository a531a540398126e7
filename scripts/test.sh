#!/usr/bin/env bash
# A fresh clone to a passed test suite: ./scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "$0")/environment.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$(dirname "$PYTHON")/lint-imports"
"$PYTHON" -m pytest "$@"
