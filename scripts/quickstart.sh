#!/usr/bin/env bash
# A fresh clone to a trained, evaluated model on real images, without a GPU: ./scripts/quickstart.sh [overrides]
#
#   ./scripts/quickstart.sh model=convnext_atto     the plain twin under the same recipe
set -euo pipefail
. "$(dirname "$0")/environment.sh"
[ -d data/digits/val ] || "$PYTHON" scripts/data/prepare_digits.py data/digits
"$PYTHON" train.py experiment=digits "$@"
# The run's folder, as the same overrides compose it
config=$("$PYTHON" train.py experiment=digits "$@" --cfg job --resolve)
"$PYTHON" evaluate.py checkpoint="$(sed -n 's/^output_dir: //p' <<< "$config")/$(sed -n 's/^run_name: //p' <<< "$config")"
