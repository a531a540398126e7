"""Weights & Biases as a mirror of metrics.jsonl: it may be slow, hang, fail or die, and the run does not notice.

Everything that talks to W&B runs in a thread of its own; the run only puts rows into its queue.
"""

import logging
import netrc
import os
import secrets
import tempfile
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from contextual_cnn.runs.own_files import replaced
from contextual_cnn.settings.logger import LoggerSettings

log = logging.getLogger(__name__)

_INIT_TIMEOUT = 15  # seconds; W&B's own patience without a network is 100 s
_HURRY = 5  # seconds


class WandbLogger:
    """Never a prompt, never an exception.

    Args:
        folder: of the run; W&B's files go to its wandb/.
        config: shown there.
    """

    def __init__(self, folder: Path, settings: LoggerSettings, config: dict[str, Any], run_name: str) -> None:
        mode: str = settings.wandb
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        options = dict(project=settings.project, entity=settings.entity, name=run_name, dir=folder, config=config)
        self._folder, self._patience = folder, settings.patience
        self._rows: SimpleQueue[dict[str, float] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._mirror, args=(mode, options), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._rows.put({"step": step, **metrics})

    def close(self, in_a_hurry: bool = False) -> None:
        patience = min(self._patience, _HURRY) if in_a_hurry else self._patience
        self._rows.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            log.warning("W&B has not finished in %.0f s and is left behind; metrics.jsonl has every row", patience)

    def _mirror(self, mode: str, options: dict[str, Any]) -> None:
        run = self._open(mode, options)
        if run is None:
            return
        try:
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:  # its helper process may have died
            log.warning("W&B stopped accepting metrics (%s); they go on in metrics.jsonl", _first_line(error))

    def _open(self, mode: str, options: dict[str, Any]) -> Any:
        """The run online if that is the mode, else or failing that offline; None if W&B does not work at all."""
        try:
            tempfile.TemporaryFile(dir=_made(self._folder / "wandb")).close()
        except OSError as error:  # W&B would go to the system's folder for temporary files, which others can see
            log.warning("W&B is left out, as its folder cannot be written (%s)", error)
            return None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                import wandb

                settings = wandb.Settings(
                    init_timeout=_INIT_TIMEOUT,
                    console="off",
                    silent=True,
                    save_code=False,
                    # Command line, host, user and the address of the clone's remote are nobody's business there
                    x_disable_meta=True,
                    disable_git=True,
                    host="",
                )
                identity: dict[str, Any] = dict(id=_run_id(self._folder), resume="allow", mode=attempt)
                run = wandb.init(**options, **identity, settings=settings)
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
            except Exception as error:  # W&B raises errors of its own, of pydantic and of the network
                log.warning("W&B %s is not available (%s)", attempt, _first_line(error))
            else:
                log.info("W&B: %s run %s", attempt, run.id)
                return run
        return None


def has_wandb_key() -> bool:
    """Whether there is an API key, in the environment or by `wandb login`; it is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _run_id(folder: Path) -> str:
    """The run's W&B id, made once and kept in its folder, so that a resumed run is the same run there."""
    path = folder / "wandb_id.txt"
    if not path.exists() or not path.read_text().strip():
        with replaced(path) as new:
            new.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
