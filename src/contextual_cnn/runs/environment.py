"""What a run ran on, so that a figure can be judged later."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "contextual-cnn",
    "triton",
    "torch",
    "torchvision",
    "timm",
    "hydra-core",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "wandb",
)


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


class Report:
    """A script's findings as JSON, on the terminal and in a file as they come.

    A script that is stopped loses only what it was at: until the last finding the file holds "incomplete": true.

    Args:
        output: the file, if there is to be one; it is rewritten whole with each finding.
        contents: the report's entries as far as they are known.
    """

    def __init__(self, output: Path | None, **contents: Any) -> None:
        self._output, self._contents = output, contents
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        self._write(contents | {"incomplete": True})

    def add(self, finding: dict[str, Any], **contents: Any) -> None:
        """Prints one line. contents: the entries that it belongs to, as they are now."""
        print(json.dumps(finding), flush=True)
        self._contents |= contents
        self._write(self._contents | {"incomplete": True})

    def finish(self, **contents: Any) -> None:
        """Prints the whole."""
        self._contents |= contents
        print(json.dumps(self._contents, indent=2), flush=True)
        self._write(self._contents)

    def _write(self, contents: dict[str, Any]) -> None:
        if self._output is None:
            return
        # In place only where a new file would take the place of a device or a pipe
        new = not self._output.exists() or self._output.is_file()
        target = self._output.with_name(f"{self._output.name}.tmp") if new else self._output
        target.write_text(json.dumps(contents, indent=2) + "\n")
        if new:
            target.replace(self._output)


def print_report(report: dict[str, Any], output: Path | None) -> None:
    """Findings that are there all at once."""
    Report(output, **report).finish()


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
