"""The doctor: on this machine, and where something is missing."""

import os
import sys

import pytest

from tests.conftest import ROOT, run_command, run_python

pytestmark = pytest.mark.run


def test_a_working_machine_passes():
    done = run_command("scripts/doctor.py")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("Python", "torch", "GPU", "DALI", "C++ kernels", "W&B", "disk", "shared memory"):
        assert any(line[6:].startswith(row) for line in done.stdout.splitlines()), row
    lines = done.stdout.splitlines()
    for i, line in enumerate(lines):
        assert line.startswith("warn") == (lines[i + 1 : i + 2] != [] and "->" in lines[i + 1])


def test_a_broken_package_is_named_and_fails(tmp_path):
    """timm that cannot be imported, as beside a torchvision of another build."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    done = run_python("scripts/doctor.py", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert done.returncode == 1
    assert "FAIL  import timm" in done.stdout
    assert "torchvision::nms does not exist" in done.stdout
    assert "->" in done.stdout  # what to do


def test_a_bare_python_is_told_what_to_install():
    done = run_python("-S", "scripts/doctor.py", PYTHONPATH=str(ROOT / "src"))
    assert done.returncode == 1
    assert "FAIL  torch " in done.stdout
    assert "pip install -c constraints.txt -e ." in done.stdout
    assert "ok    Python" in done.stdout
    assert sys.executable in done.stdout
