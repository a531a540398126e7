"""scripts/cluster/submit.py, by submitit's local executor: a job that is signalled saves, comes back, and goes on."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.run

# In the place of torchrun and the training, which test_launcher.py and test_slurm.py run: saves at the first call's
# signal, is complete at the second call
TRAINING = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
[ "$(wc -l < "$CALLS")" = 2 ] && exit 0
bash -c 'trap "echo 75 > $CONTEXTUAL_CNN_STATUS_FILE; exit 0" USR1; while :; do sleep 0.1; done' & # the one process
wait $!
"""


def test_a_job_that_is_signalled_comes_back_with_the_same_command(tmp_path):
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(TRAINING)
    python.chmod(0o755)
    submit = subprocess.Popen(
        [sys.executable, "scripts/cluster/submit.py", "--local", "--logs", str(tmp_path / "logs"), "run_name=a b"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(python), "CALLS": str(calls)},
        stdout=subprocess.PIPE,
        text=True,
    )
    job = int(re.match(r"job (\d+)", submit.stdout.readline()).group(1))
    deadline = time.monotonic() + 300
    while not calls.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The local executor's controller passes on no signal of SLURM's; its child is the task that gets one
    (task,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR1)
    submit.communicate(timeout=200)
    assert submit.returncode == 0
    first, second = calls.read_text().splitlines()
    assert first == second
    assert "torch.distributed.run --max-restarts" in first
    assert "--nnodes 1 --nproc-per-node 1 --rdzv-backend c10d" in first
    assert first.endswith("train.py run_name=a b")


def test_a_signal_before_the_launcher_is_started_brings_the_job_back_too():
    training = runpy.run_path(str(ROOT / "scripts" / "cluster" / "submit.py"))["Training"]
    again = training("8", ["run_name=a"]).checkpoint()
    assert (again.function.processes, again.function.overrides) == ("8", ["run_name=a"])


def test_it_explains_itself():
    printed = run_command("scripts/cluster/submit.py", "--help").stdout
    assert "--partition" in printed
    assert "goes back into the queue" in " ".join(printed.split())


def test_what_slurm_is_told(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", "exit 1"), ("sbatch", f'cp "$1" {tmp_path}/batch\necho "Submitted batch job 4711"')):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    done = run_command(
        "scripts/cluster/submit.py",
        *("--logs", str(tmp_path / "logs"), "--nodes", "2", "--partition", "gpu", "--hours", "0.5", "run_name=a"),
        PATH=f"{commands}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job 4711; its log: ")
    told = (tmp_path / "batch").read_text()
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "partition=gpu", "time=30", "signal=USR1@120"):
        assert f"#SBATCH --{line}\n" in told, told
    assert "#SBATCH --requeue" in told
    assert "--cpus-per-task 64 --cpu-bind=none" in next(line for line in told.splitlines() if line.startswith("srun"))
    assert "#SBATCH --exclusive" in told
