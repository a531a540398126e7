"""Where the checkpoint of a run lies; nothing is read here."""

from pathlib import Path

from contextual_cnn.errors import UserError


def find_checkpoint(given: str | Path, key: str = "checkpoint") -> Path:
    """Finds the checkpoint of a run folder: the best, or the last if there is no best. A file is returned as it is.

    Args:
        key: what it was given for.

    Raises:
        UserError: there is none.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist", "give a run folder (outputs/NAME) or a .pt file in it")
    if not path.is_dir():
        return path
    for candidate in _in_folder(path):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{key}: {path} holds no checkpoints/best.pt or last.pt",
        "give a run folder (outputs/NAME) or a .pt file",
    )


def has_checkpoint(folder: Path) -> bool:
    """Whether `find_checkpoint` finds one there."""
    return any(candidate.is_file() for candidate in _in_folder(folder))


def _in_folder(folder: Path) -> list[Path]:
    return [parent / f"{name}.pt" for parent in (folder / "checkpoints", folder) for name in ("best", "last")]
