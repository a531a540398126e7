"""One run, one folder: OUTPUT_DIR/RUN_NAME with config, environment, metrics, log and checkpoints.

Only rank 0 writes. What a run was can be read there later without this program.
"""

import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console
from rich.logging import RichHandler

from contextual_cnn.errors import UserError
from contextual_cnn.runs.environment import environment
from contextual_cnn.runs.own_files import open_own, replaced

log = logging.getLogger(__name__)

# Modules whose warnings are about this process, and not about the run
_OF_ONE_RANK = ("contextual_cnn.data.bad_images", "contextual_cnn.guards", "contextual_cnn.ops")


class RunFolder:
    """The paths of a run. Nothing is created before it is `claimed`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.lr_schedule = path / "lr_schedule.png"
        self._lock = path / "lock"

    @contextmanager
    def claimed(self, patience: float = 30) -> Iterator[None]:
        """As long as it is open, no other process writes here; made if it is not there.

        Waits for a run that is just ending, as one that a scheduler has replaced by this one does. A folder in which
        nothing has been written is removed on leaving.

        Args:
            patience: seconds.

        Raises:
            UserError: another process still has it, or it cannot be written.
        """
        lock = self._claim(time.monotonic() + patience)
        try:
            yield
        finally:
            with suppress(OSError):  # somebody may have removed it in mid-run
                if os.listdir(self.path) == [self._lock.name]:
                    self._lock.unlink()
                    self.path.rmdir()
            os.close(lock)

    def _claim(self, deadline: float) -> int:
        """The descriptor of the locked file."""
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = open_own(self._lock, os.O_RDWR)
            except OSError as error:
                raise _not_writable(self.path, error) from error
            is_ours = _try_to_lock(lock)
            if is_ours and _is_of(lock, self._lock):  # not of a file that another process has removed meanwhile
                _sign(lock)
                return lock
            owner = _owner(lock)
            os.close(lock)
            if is_ours:
                continue
            if time.monotonic() > deadline:
                raise UserError(f"{self.path} is in use by {owner}", "stop that run, or use run_name=NEW_NAME")
            log.info("%s is in use by %s; waiting for its end", self.path, owner)
            time.sleep(2)

    def prepare(self, config: dict[str, Any]) -> None:
        """Records config and environment in the claimed folder, and adds train.log to the program's log.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(exist_ok=True)
            with replaced(self.config) as new:
                new.write_text(yaml.safe_dump(config, sort_keys=False))
            with replaced(self.path / "environment.json") as new:
                new.write_text(json.dumps(environment(), indent=2) + "\n")
            handler = logging.StreamHandler(_open_log(self.path / "train.log"))
        except OSError as error:
            raise _not_writable(self.path, error) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("contextual_cnn").addHandler(handler)


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"the run folder {folder} cannot be written: {error}", "set output_dir=FOLDER")


def _open_log(path: Path) -> TextIO:
    return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8", errors="backslashreplace")


def _is_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _owner(lock: int) -> str:
    return os.pread(lock, 300, 0).decode(errors="backslashreplace").strip()


def _sign(lock: int) -> None:
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:  # a full disk: the lock itself needs no room
        log.warning("the lock of the run folder: %s", error)


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems know no locks
        log.warning("the run folder cannot be locked (%s): see to it that no second run writes there", error)
    return True


def start_logging(is_main: bool) -> Console:
    """The program's log to the console on rank 0; from the others, warnings of what may be theirs alone."""
    console = Console(soft_wrap=True)
    logging.raiseExceptions = False  # a full disk or a closed terminal costs lines of the log, not the run
    root = logging.getLogger("contextual_cnn")
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    if console.is_terminal:
        root.addHandler(RichHandler(console=console, show_path=False, log_time_format="%X"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
    if not is_main:  # a thousand ranks would say the same thing a thousand times
        for to_console in root.handlers:
            to_console.addFilter(lambda record: record.name.startswith(_OF_ONE_RANK))
    return console
