"""One run, one folder: OUTPUT_DIR/RUN_NAME with config, environment, metrics, log and checkpoints.

Only rank 0 writes. What a run was can be read there later without this program.
"""

import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.logging import RichHandler

from contextual_cnn.errors import UserError

_PACKAGES = (
    "contextual-cnn",
    "torch",
    "torchvision",
    "timm",
    "hydra-core",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "wandb",
)


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


def environment() -> dict[str, Any]:
    """What the run ran on: command, commit, versions, device."""
    return {
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


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


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
