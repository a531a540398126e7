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
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.logging import RichHandler

from contextual_cnn.engine.environment import environment
from contextual_cnn.errors import UserError

log = logging.getLogger(__name__)


class RunFolder:
    """The paths of a run. Nothing is created before `prepare`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.lr_schedule = path / "lr_schedule.png"
        self._lock: int | None = None

    def claim(self, patience: float = 30) -> None:
        """Makes sure that no other process writes here, until this one ends; a folder that does not exist is nobody's.

        Waits for a run that is just ending, as one that a scheduler has replaced by this one does.

        Args:
            patience: seconds.

        Raises:
            UserError: another process still has it.
        """
        if self._lock is not None or not self.path.is_dir():
            return
        lock = self.path / "lock"
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written: {error}", "set output_dir=FOLDER"
            ) from error
        deadline = time.monotonic() + patience
        while not _try_to_lock(self._lock):
            owner = lock.read_text().strip()
            if time.monotonic() > deadline:
                raise UserError(f"{self.path} is in use by {owner}", "stop that run, or use run_name=NEW_NAME")
            log.info("%s is in use by %s; waiting for its end", self.path, owner)
            time.sleep(2)
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:  # a full disk: the lock itself needs no room
            log.warning("%s: %s", lock, error)

    def prepare(self, config: dict[str, Any]) -> None:
        """Creates the folder, records config and environment, and adds train.log to the program's log.

        Raises:
            UserError: the folder cannot be created or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.claim()
            self.config.write_text(yaml.safe_dump(config, sort_keys=False))
            (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
            handler = logging.FileHandler(self.path / "train.log")
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written: {error}", "set output_dir=FOLDER"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("contextual_cnn").addHandler(handler)


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems know no locks
        log.warning("the run folder cannot be locked (%s): see to it that no second run writes there", error)
    return True


def start_logging(is_main: bool) -> Console:
    """The program's log to the console on rank 0; warnings and worse only from the others."""
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
    return console
