"""Where metrics go: always one JSON line each to the run folder, and to W&B as far as it works.

The file is the truth; W&B is a mirror that may fail without the run noticing.
"""

import json
import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import Any, Literal, Protocol

from contextual_cnn.errors import UserError

log = logging.getLogger(__name__)

_INIT_TIMEOUT = 15  # seconds; W&B's own patience without a network is 100 s


class MetricsLogger(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class NullLogger:
    """For the ranks that log nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLinesLogger:
    """metrics.jsonl: {"step": ..., name: value, ...} a line, flushed with each.

    Args:
        resumed_step: rows of later steps, by a run that was killed after its last checkpoint, are dropped;
            they will be written again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step] if resumed_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self._file.close()


class WandbLogger:
    """Weights & Biases; never a prompt, and no failure of it reaches the run."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        project: str,
        entity: str | None,
        run_name: str,
        mode: str,
    ) -> None:
        import wandb

        self._run = None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = wandb.init(
                    project=project,
                    entity=entity,
                    name=run_name,
                    id=_run_id(folder),
                    resume="allow",
                    dir=folder,
                    config=config,
                    mode=attempt,
                    settings=wandb.Settings(init_timeout=_INIT_TIMEOUT, console="off", silent=True, save_code=False),
                )
            except Exception as error:  # W&B raises errors of its own, of pydantic and of the network
                log.warning("W&B %s is not available (%s)", attempt, str(error).splitlines()[0])
            else:
                self._run.define_metric("step")
                self._run.define_metric("*", step_metric="step")
                log.info("W&B: %s run %s", attempt, self._run.id)
                return

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except Exception as error:  # its helper process may have died
            log.warning("W&B stopped accepting metrics (%s); they go on in metrics.jsonl", error)
            self._run = None

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            log.warning("W&B could not finish the run (%s)", error)


class Loggers:
    """Several loggers as one."""

    def __init__(self, *loggers: MetricsLogger) -> None:
        self._loggers = loggers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, metrics)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def open_loggers(
    folder: Path,
    config: dict[str, Any],
    run_name: str,
    resumed_step: int,
    *,
    wandb: Literal["auto", "online", "offline", "off"] = "auto",
    project: str = "contextual-cnn",
    entity: str | None = None,
) -> MetricsLogger:
    """Rank 0's loggers.

    Args:
        wandb: "auto" is what WANDB_MODE says; without it online where there is an API key (WANDB_API_KEY or
            `wandb login`) and offline elsewhere; `wandb sync FOLDER/wandb/offline-run-*` sends an offline run later.
    """
    lines = JsonLinesLogger(folder / "metrics.jsonl", resumed_step)
    if wandb == "off":
        return lines
    if wandb == "online" and not has_wandb_key():
        raise UserError(
            "logger.wandb=online, but there is no W&B API key",
            "run `wandb login`, or use logger.wandb=offline",
        )
    return Loggers(lines, WandbLogger(folder, config, project=project, entity=entity, run_name=run_name, mode=wandb))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a line cut short by a kill is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: passed over a damaged line", path)
    return rows


def _run_id(folder: Path) -> str:
    """The run's W&B id, made once and kept in its folder, so that a resumed run is the same run there."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
