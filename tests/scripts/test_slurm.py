"""scripts/cluster/train.sbatch: bash understands it, and it does its part, with stand-ins for SLURM's two commands."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import ROOT, small_run
from tests.helpers.facts import tells
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.slurm import SlurmJob

pytestmark = pytest.mark.run

SCRIPTS = ["scripts/cluster/train.sbatch", "scripts/launch.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_it(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def job(tmp_path):
    """Its first host is this machine."""
    return SlurmJob(tmp_path, ["localhost", "node2"])


def test_the_signal_before_the_end_saves_and_requeues(job, image_root, tmp_path):
    _, *overrides = small_run(image_root, tmp_path, "schedule.epochs=100", *CROPS_ALONE)
    started = job.start(*overrides)
    deadline = time.monotonic() + 300
    while not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert time.monotonic() < deadline, job.printed
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGUSR1)
    assert started.wait(200) == 75, job.printed
    assert tells(job.printed, "SIGUSR1")
    assert job.requeued == [job.number]


def test_a_signal_before_srun_is_started_requeues_too(job, tmp_path):
    scontrol = job.commands / "scontrol"
    until_told = f"touch {tmp_path}/asked; until [ -e {tmp_path}/told ]; do sleep 0.05; done; "
    scontrol.write_text(scontrol.read_text().replace("show) ", f"show) {until_told}"))
    started = job.start("optimizer.lrr=1")  # should it come so far
    deadline = time.monotonic() + 300
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGUSR1)
    (tmp_path / "told").touch()
    assert started.wait(200) == 75, job.printed
    assert job.requeued == [job.number]


def test_a_mistake_is_not_requeued(job):
    assert job.start("optimizer.lrr=1").wait(200) == 2, job.printed
    assert job.requeued == []


def test_the_processes_of_a_node_have_its_cores(job, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nenv -u OMP_NUM_THREADS nproc >"$CORES"\n')
    python.chmod(0o755)
    cores = tmp_path / "cores"
    assert job.start(PYTHON=str(python), CORES=str(cores)).wait(60) == 0, job.printed
    assert int(cores.read_text()) == len(os.sched_getaffinity(0))
