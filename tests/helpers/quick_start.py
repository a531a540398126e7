"""train.py and evaluate.py in processes of their own without the seconds of imports: children of a fork server.

The real entry points run, with their arguments, signals and exit statuses. What differs from the shell is only that
torch, DALI and the rest are imported already.
"""

import multiprocessing
import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PRELOAD = ["torch", "timm", "hydra", "wandb", "nvidia.dali.plugin.pytorch", "matplotlib.pyplot", "train", "evaluate"]
_PRELOAD += ["pytest", "sklearn.datasets"]  # of the main modules that start commands, which each child imports again

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


class Command:
    """A command of this project that has been started.

    Args:
        command: script and arguments.
        output: the file that gets stdout, and stderr too.
        errors: the file that gets stderr instead.
        folder: where it runs.
        environment: variables added to this process's; an empty text removes one.
    """

    def __init__(
        self, *command: str, output: Path, errors: Path | None = None, folder: Path = ROOT, **environment: str
    ) -> None:
        environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | environment
        self.output = output
        output.unlink(missing_ok=True)
        files = (str(output), str(errors or output))
        self.process = _context.Process(target=_run, args=(list(command), files, str(folder), environment))
        self.process.start()

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, timeout: float = 120) -> int:
        """The exit status; minus the signal's number if one ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.printed}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Polls; an end of the process before is an error."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                raise TimeoutError(f"it did not come to that (status {self.process.exitcode}):\n{self.printed}")
            time.sleep(0.01)

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid, signal_number)


def run(*command: str, output: Path, folder: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    started = Command(*command, output=output, folder=folder, **environment)
    return started.wait(), started.printed


def group(
    processes: int,
    *command: str,
    folder: Path,
    per_rank: dict[int, list[str]] | None = None,
    environments: dict[int, dict[str, str]] | None = None,
    **environment: str,
) -> list[Command]:
    """The processes of one run, by rank, as torchrun would start them; output_RANK in the folder.

    Args:
        per_rank: further arguments of some ranks.
        environments: further variables of some ranks.
    """
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
    return [
        Command(
            *command,
            *(per_rank or {}).get(rank, []),
            output=folder / f"output_{rank}",
            **meeting,
            **dict(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes)),
            **environment,
            **(environments or {}).get(rank, {}),
        )
        for rank in range(processes)
    ]


def free_port() -> int:
    """A port of this machine where nobody listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(command: list[str], files: tuple[str, str], folder: str, environment: dict[str, str]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding=encoding) for number in (1, 2))
    os.environ.update(environment)
    for name in [name for name, value in environment.items() if not value]:
        del os.environ[name]
    if "TEST_LARGEST_FILE" in environment:  # as if the disk were full for anything larger
        largest = int(environment["TEST_LARGEST_FILE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if "TEST_UMASK" in environment:
        os.umask(int(environment["TEST_UMASK"], 8))
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str((ROOT / command[0]).parent))  # as the shell's python has it
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")
