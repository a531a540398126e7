"""Where metrics go: always one JSON line each to the run folder, and to W&B as far as it works.

The file is the truth; W&B is a mirror that may fail without the run noticing.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from contextual_cnn.errors import UserError
from contextual_cnn.runs.own_files import open_own
from contextual_cnn.runs.wandb_logger import WandbLogger, has_wandb_key
from contextual_cnn.settings.logger import LoggerSettings

log = logging.getLogger(__name__)


class MetricsLogger(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self, in_a_hurry: bool = False) -> None:
        """Writes what is left; does not wait long for a server, and if somebody else is waiting, hardly at all."""
        ...


class NullLogger:
    """For the ranks that log nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def close(self, in_a_hurry: bool = False) -> None:
        pass


class JsonLinesLogger:
    """metrics.jsonl: {"step": ..., name: value, ...} a line, with the system as soon as it is logged.

    What cannot be written, as on a full disk, is kept and written with the next row.

    Args:
        resumed_step: rows of later steps, by a run that was killed after its last checkpoint, are cut off;
            they will be written again.

    Raises:
        UserError: there is something else of that name.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        try:
            self._file = open_own(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._file, _length_up_to(path, resumed_step))
        except OSError as error:
            raise UserError(
                f"the metrics cannot be written: {error}", f"mv {path} {path}.old, or run_name=NEW_NAME"
            ) from error
        self._pending = b""
        self._is_failing = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._pending += json.dumps({"step": step, **metrics}).encode() + b"\n"
        self._write()

    def close(self, in_a_hurry: bool = False) -> None:
        self._write()
        os.close(self._file)
        if self._pending:
            log.error(
                "%s could not be completed, these rows are missing there:\n%s", self._path, self._pending.decode()
            )

    def _write(self) -> None:
        try:
            while self._pending:  # the system may take a part of it
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            if not self._is_failing:
                log.warning("%s cannot be written (%s); its rows are kept until it can", self._path, error)
            self._is_failing = True
        else:
            self._is_failing = False


class Loggers:
    """Several loggers as one."""

    def __init__(self, *loggers: MetricsLogger) -> None:
        self._loggers = loggers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, metrics)

    def close(self, in_a_hurry: bool = False) -> None:
        for logger in self._loggers:
            logger.close(in_a_hurry)


def open_loggers(
    folder: Path, settings: LoggerSettings, config: dict[str, Any], run_name: str, resumed_step: int
) -> MetricsLogger:
    """Rank 0's loggers."""
    check_key(settings)
    lines = JsonLinesLogger(folder / "metrics.jsonl", resumed_step)
    if settings.wandb == "off":
        return lines
    return Loggers(lines, WandbLogger(folder, settings, config, run_name))


def check_key(settings: LoggerSettings) -> None:
    """Raises UserError where an online run was insisted on that cannot be one."""
    if settings.wandb == "online" and not has_wandb_key():
        raise UserError(
            "logger.wandb=online, but there is no W&B API key",
            "run `wandb login`, or use logger.wandb=offline",
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a line that is not a row, as one cut short by a kill, is left out."""
    if not path.exists():
        return []
    with path.open("rb") as lines:
        rows = [_parse(line) for line in lines]
    if None in rows:
        log.warning("%s: %d damaged lines are left out", path, rows.count(None))
    return [row for row in rows if row is not None]


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the lines up to the last whole one of this step or one before it."""
    length = kept = 0
    with path.open("rb") as lines:
        for line in lines:
            length += len(line)
            row = _parse(line)
            if row is not None and row["step"] <= step and line.endswith(b"\n"):
                kept = length
    return kept


def _parse(line: bytes) -> dict[str, float] | None:
    """A row, or None for anything else that a line may hold."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int
    return row if is_row and all(isinstance(value, int | float) for value in row.values()) else None
