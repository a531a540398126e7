"""scripts/cluster/train.sbatch as SLURM starts it, with stand-ins for SLURM's two commands."""

import os
import random
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.launched import ROOT

_SCONTROL = 'case "$1" in show) printf "%s\\n" $HOSTS;; requeue) echo "$2" >>"$REQUEUED";; esac\n'


class SlurmJob:
    """A job that may be started again.

    Args:
        folder: for the stand-ins, what is printed, and the numbers of the jobs that were put back into the queue.
        hosts: the names of its nodes.
        through: for each node on which srun starts the command, what it is put behind there; alone, nothing.
    """

    def __init__(self, folder: Path, hosts: Sequence[str], through: Sequence[Sequence[str]] = ((),)) -> None:
        self.number, self._output, self._requeued = _free_job(), folder / "output", folder / "requeued"
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name, text in (("scontrol", _SCONTROL), ("srun", _srun(through))):
            (self.commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.commands / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{self.commands}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PROCESSES_PER_NODE": "1",
            "HOSTS": " ".join(hosts),
            "REQUEUED": str(self._requeued),
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_JOB_ID": self.number,
            "SLURM_NNODES": str(len(through)),
            "SLURM_JOB_NODELIST": ",".join(hosts),
            "SLURM_SUBMIT_DIR": str(ROOT),
        }

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen:
        with self._output.open("a") as output:
            return subprocess.Popen(
                ["bash", "scripts/cluster/train.sbatch", *overrides],
                cwd=ROOT, env=self._environment | environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        """Of all starts."""
        return self._output.read_text()

    @property
    def requeued(self) -> list[str]:
        return self._requeued.read_text().split() if self._requeued.exists() else []


def _srun(through: Sequence[Sequence[str]]) -> str:
    """As SLURM's it passes USR1 on to the command on every node, and ends with the highest status.

    Since SLURM 22.05 it gives a task one core, unless it is told otherwise itself.
    """
    started = [f'{shlex.join(before)} $pin "$@" & tasks+="$! "' for before in through]
    told = '$(cat "/proc/$task/task/$task/children")' if any(through) else "$task"
    return "\n".join([
        "pin='taskset -c 0'",
        "while [[ $1 == --* ]]; do if [[ $1 == --cpus-per-task=?* ]]; then pin=''; fi; shift; done",
        *started,
        f"trap 'for task in $tasks; do kill -USR1 {told}; done' USR1",
        "highest=0",
        "for task in $tasks; do",
        "    wait $task; status=$?",
        "    while kill -0 $task 2>/dev/null; do wait $task; status=$?; done",
        "    [ $status -le $highest ] || highest=$status",
        "done",
        "exit $highest", "",
    ])  # fmt: skip


def _free_job() -> str:
    """The number of a job at whose port nobody listens now: 20000 and the number's last four digits."""
    for number in random.sample(range(10000), 10000):
        with socket.socket() as port, suppress(OSError):
            port.bind(("127.0.0.1", 20000 + number))
            return str(10000 + number)
    raise OSError("no free port")
