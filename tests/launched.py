"""scripts/launch.sh as it is started for a long run, to be watched and hurt."""

import os
import subprocess
import sys
import time
from pathlib import Path

from contextual_cnn.engine.loggers import read_metrics

ROOT = Path(__file__).parent.parent


class Launched:
    """scripts/launch.sh with two processes on this node."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        self.output = folder / "output"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", **environment}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", "scripts/launch.sh", "--standalone", "--nproc-per-node", "2", *command],
                cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.metrics = folder / "run" / "metrics.jsonl"

    @property
    def printed(self) -> str:
        return self.output.read_text()

    @property
    def step(self) -> int:
        return max((row["step"] for row in read_metrics(self.metrics)), default=0)

    def wait_until(self, condition, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def wait_until_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step)

    def wait(self, timeout: float = 200) -> int:
        return self.process.wait(timeout)

    @property
    def agent(self) -> int:
        """torchrun's process; the shell's other children have gone."""
        (agent,) = (pid for pid in children(self.process.pid) if children(pid))
        return agent

    @property
    def workers(self) -> list[int]:
        return sorted(children(self.agent))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
