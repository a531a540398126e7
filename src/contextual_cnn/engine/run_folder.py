"""One run, one folder: OUTPUT_DIR/RUN_NAME with config, environment, metrics, log and checkpoints.

Only rank 0 writes. What a run was can be read there later without this program.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.logging import RichHandler

from contextual_cnn.engine.environment import environment
from contextual_cnn.errors import UserError


class RunFolder:
    """The paths of a run. Nothing is created before `prepare`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"

    def prepare(self, config: dict[str, Any]) -> None:
        """Creates the folder, records config and environment, and adds train.log to the program's log.

        Raises:
            UserError: the folder cannot be created or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.config.write_text(yaml.safe_dump(config, sort_keys=False))
            (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
            handler = logging.FileHandler(self.path / "train.log")
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written: {error}", "set output_dir=FOLDER"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("contextual_cnn").addHandler(handler)


def start_logging(is_main: bool) -> Console:
    """The program's log to the console on rank 0; warnings and worse only from the others."""
    console = Console(soft_wrap=True)
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
