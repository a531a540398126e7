"""scripts/dev/gpu_first_hour.sh, run on a CPU: the list itself works, before a GPU is at hand."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_list_passes_on_a_cpu(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/dev/gpu_first_hour.sh", str(tmp_path), "--cpu"],
        cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    summary = (tmp_path / "summary").read_text()
    assert done.returncode == 0, summary
    assert "expected" not in summary
    steps = [line.partition(":")[0] for line in summary.splitlines()]
    assert steps[:3] == ["machine", "doctor", "dali"]
    assert {"lose_mistake", "lose_kill", "lose_exit", "lose_hang", "stop", "evaluate", "analyze", "tests"} <= set(steps)
