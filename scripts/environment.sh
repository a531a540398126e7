# Sourced by the other scripts: makes the virtual environment, installs the project once, sets $PYTHON.
#
#   CONTEXTUAL_CNN_VENV   the environment to make or use; .venv in the checkout by default
#   DALI                  dali-cu13 (default) or dali-cu12
#
# Needs Python 3.11 or 3.12, pip and git. A second call finds everything done.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CONTEXTUAL_CNN_VENV:-.venv}
dali=${DALI:-dali-cu13}
# OpenMP threads sleep while they wait. By default they spin, and two processes on the same cores then train at a
# tenth of their speed instead of half (20 against 160 images/s each, two digit runs on 2 cores).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

find_python() {
    local name
    for name in python3.12 python3.11 python3 python; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found" >&2
    echo "  fix: install one, or set CONTEXTUAL_CNN_VENV to an environment that has it" >&2
    return 2
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || exit 2
    echo "making the virtual environment $venv with $($python --version)"
    "$python" -m venv "$venv"
fi
PYTHON=$(realpath -s "$venv/bin/python")

# Installed for this checkout and these requirements? The stamp says so.
stamp="$venv/.contextual-cnn-installed"
wanted=$({ pwd; echo "$dali"; cat pyproject.toml constraints.txt; } | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing (PyTorch with CUDA and DALI are about 6 GB; minutes, once)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$dali,dev]"
    echo "$wanted" > "$stamp"
fi
