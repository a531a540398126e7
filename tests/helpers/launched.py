"""scripts/launch.sh as it is started for a long run, to be watched and hurt."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from contextual_cnn.runs.loggers import read_metrics

ROOT = Path(__file__).parents[2]


class Launched:
    """scripts/launch.sh on this node.

    Args:
        nodes: torchrun's options.
        name: of the file that gets stdout and stderr.
        through: what it is put behind, where that is on a node of `namespaces.Nodes`.
    """

    def __init__(
        self,
        folder: Path,
        *command: str,
        nodes: Sequence[str] = ("--standalone", "--nproc-per-node", "2"),
        name: str = "output",
        through: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.output = folder / name
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", **environment}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*through, "bash", "scripts/launch.sh", *nodes, *command],
                cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._is_elsewhere = bool(through)
        self.metrics = folder / "run" / "metrics.jsonl"

    @property
    def printed(self) -> str:
        return self.output.read_text()

    @property
    def step(self) -> int:
        return max((row["step"] for row in read_metrics(self.metrics)), default=0)

    def wait_until(self, condition, timeout: float = 120, every: float = 0.02) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.printed
            time.sleep(every)

    def wait_until_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step)

    def wait(self, timeout: float = 200) -> int:
        return self.process.wait(timeout)

    @property
    def launcher(self) -> int:
        """scripts/launch.sh itself."""
        return children(self.process.pid)[0] if self._is_elsewhere else self.process.pid

    @property
    def agent(self) -> int | None:
        """torchrun's process; the shell's other children come and go. None before it is started."""
        return next((pid for pid in children(self.launcher) if "torch.distributed.run" in command_of(pid)), None)

    @property
    def workers(self) -> list[int]:
        return sorted(children(self.agent)) if self.agent is not None else []


def of_process(pid: int, file: str) -> str:
    """What the system has in /proc; nothing of a process that ends meanwhile (ESRCH where its file is open already)."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    return [int(child) for child in of_process(pid, f"task/{pid}/children").split()]


def descendants(pid: int) -> list[int]:
    """Those of all its threads, and theirs."""
    try:
        threads = [thread.name for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    found = [int(child) for thread in threads for child in of_process(pid, f"task/{thread}/children").split()]
    return found + [further for child in found for further in descendants(child)]


def command_of(pid: int) -> str:
    return of_process(pid, "cmdline")


def has_loaded(pid: int, library: str) -> bool:
    return library in of_process(pid, "maps")


def listens(pid: int) -> bool:
    """Whether it has handlers for SIGTERM, by the system's own account."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def is_running(pid: int) -> bool:
    return of_process(pid, "stat").split()[2:3] not in ([], ["Z"])
