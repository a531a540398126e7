"""scripts/cluster/train.sbatch: bash understands it, and it does its part, with stand-ins for SLURM's two commands."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import ROOT, small_run
from tests.helpers.facts import tells
from tests.helpers.overrides import CROPS_ALONE

pytestmark = pytest.mark.run

SCRIPTS = ["scripts/cluster/train.sbatch", "scripts/launch.sh"]

# One node called localhost; srun runs the command here, and passes signals on as SLURM's does. Since 22.05 it gives a
# task one core, unless it is told otherwise itself
STAND_INS = {
    "scontrol": 'case "$1" in show) echo localhost; echo node2;; requeue) echo "$2" >"$REQUEUED";; esac\n',
    "srun": "pin='taskset -c 0'\n"
    "while [[ $1 == --* ]]; do if [[ $1 == --cpus-per-task=?* ]]; then pin=''; fi; shift; done\n"
    '$pin "$@" & task=$!\ntrap "kill -USR1 $task" USR1\nwait $task; status=$?\n'
    "while kill -0 $task 2>/dev/null; do wait $task; status=$?; done\nexit $status\n",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_it(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def environment(tmp_path):
    """What SLURM would set, and its commands' stand-ins first in PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PROCESSES_PER_NODE": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_ID": free_job(),
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def free_job() -> str:
    """The number of a job at whose port nobody listens now: 20000 and the number's last four digits."""
    for number in random.sample(range(10000), 10000):
        with socket.socket() as port, suppress(OSError):
            port.bind(("127.0.0.1", 20000 + number))
            return str(10000 + number)
    raise OSError("no free port")


def start(environment, tmp_path, *arguments):
    with (tmp_path / "output").open("w") as output:
        return subprocess.Popen(
            ["bash", "scripts/cluster/train.sbatch", *arguments],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_the_signal_before_the_end_saves_and_requeues(environment, image_root, tmp_path):
    _, *overrides = small_run(image_root, tmp_path, "schedule.epochs=100", *CROPS_ALONE)
    job = start(environment, tmp_path, *overrides)
    deadline = time.monotonic() + 300
    while not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(200) == 75, (tmp_path / "output").read_text()
    assert tells((tmp_path / "output").read_text(), "SIGUSR1")
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def test_a_signal_before_srun_is_started_requeues_too(environment, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    until_told = f"touch {tmp_path}/asked; until [ -e {tmp_path}/told ]; do sleep 0.05; done; "
    scontrol.write_text(scontrol.read_text().replace("show) ", f"show) {until_told}"))
    job = start(environment, tmp_path, "optimizer.lrr=1")  # should it come so far
    deadline = time.monotonic() + 300
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGUSR1)
    (tmp_path / "told").touch()
    assert job.wait(200) == 75, (tmp_path / "output").read_text()
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def test_a_mistake_is_not_requeued(environment, tmp_path):
    job = start(environment, tmp_path, "optimizer.lrr=1")
    assert job.wait(200) == 2, (tmp_path / "output").read_text()
    assert not (tmp_path / "requeued").exists()


def test_the_processes_of_a_node_have_its_cores(environment, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nenv -u OMP_NUM_THREADS nproc >"$CORES"\n')
    python.chmod(0o755)
    cores = tmp_path / "cores"
    done = subprocess.run(
        ["bash", "scripts/cluster/train.sbatch"],
        cwd=ROOT, env=environment | {"PYTHON": str(python), "CORES": str(cores)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert int(cores.read_text()) == len(os.sched_getaffinity(0))
