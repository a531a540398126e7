"""What tasks have in common whose data are splits of listed samples."""

from collections.abc import Mapping, Sized
from typing import Any, Protocol

from contextual_cnn.task import Task


class ListedData(Protocol):
    """A data set: its splits by name, and the names of its classes."""

    @property
    def sources(self) -> Mapping[str, Sized]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...

    def log_summary(self) -> None: ...


class ListedTask(Task):
    """Tells what it learns from by a digest of each split.

    Args:
        listings: by split, a digest of all that a step depends on but the files' contents.
    """

    def __init__(self, data: ListedData, listings: Mapping[str, str]) -> None:
        self._of, self._listings = data, listings

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        return {f"{split} images": listing for split, listing in self._listings.items()}

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds of the data."""
        return {
            "classes": list(self._of.classes),
            "images": len(self._of.sources["train"]),
            "listing": self._listings["train"],
        }

    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {split: len(source) for split, source in self._of.sources.items()}

    def log_summary(self) -> None:
        """Logs what the data are."""
        self._of.log_summary()
