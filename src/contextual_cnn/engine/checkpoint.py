"""Checkpoints: plain tensors and numbers, written whole or not at all, read without running anything in them."""

import os
from pathlib import Path
from typing import Any

import torch

from contextual_cnn.errors import UserError

FORMAT = 1


class CheckpointStore:
    """The checkpoints of one run: `last.pt` to resume from and `best.pt` to evaluate.

    Args:
        folder: created when the first checkpoint is written.
        every_epochs: how often `last.pt` is written; always after the last epoch too.
    """

    def __init__(self, folder: Path, *, every_epochs: int = 1) -> None:
        if every_epochs < 1:
            raise UserError(
                f"checkpoint.every_epochs must be 1 or more, got {every_epochs}", "checkpoint.every_epochs=1"
            )
        self.folder, self.every_epochs = folder, every_epochs

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def save(self, state: dict[str, Any], path: Path) -> None:
        """Writes beside the old file, then puts the new one in its place: a kill at any moment leaves a whole file."""
        for left_behind in self.folder.glob("*.tmp"):  # by a run killed while it wrote
            left_behind.unlink()
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state | {"format": FORMAT}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as "unexpected pos"
            temporary.unlink(missing_ok=True)
            free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
            raise UserError(
                f"the checkpoint {path} could not be written, the one before it is intact "
                f"({str(error).splitlines()[0]}; {free / 2**20:.0f} MiB free)",
                "make room, then start the same command again: it resumes",
            ) from error
        temporary.replace(path)
        _sync_folder(self.folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; nothing in the file is executed.

    Raises:
        UserError: no such file, not a checkpoint of this program, damaged, or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "give a run folder (outputs/NAME) or a .pt file in it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged file raises anything from EOFError to KeyError; a hostile one UnpicklingError
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and numbers "
            f"({type(error).__name__})",
            "use another checkpoint (best.pt or last.pt of the run)",
        ) from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise UserError(f"{path} is no checkpoint of this program", "bare weights are loaded by model.weights=FILE")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path} has format {state['format']}, this version reads up to {FORMAT}", "update contextual-cnn"
        )
    return state


def find_checkpoint(given: str) -> Path:
    """A file as it is; of a run folder its best checkpoint, or the last where there is no best."""
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    candidates = [
        path / "checkpoints" / "best.pt",
        path / "checkpoints" / "last.pt",
        path / "best.pt",
        path / "last.pt",
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"checkpoint: {path} holds no checkpoints/best.pt or last.pt",
        "give a run folder (outputs/NAME) or a .pt file",
    )


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
