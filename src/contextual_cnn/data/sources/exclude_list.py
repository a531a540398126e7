"""Images to leave out: a text file with the names that the source gives them, one a line; # begins a comment line."""

from collections.abc import Iterable
from pathlib import Path

from contextual_cnn.data.sources.class_names import read_lines


def read_exclude_list(path: Path) -> frozenset[str]:
    """The names in the file. Raises UserError if it cannot be read."""
    return frozenset(line for line in read_lines(path) if line and not line.startswith("#"))


def write_exclude_list(path: Path, reasons: Iterable[tuple[str, str]]) -> None:
    """Writes (name, reason) pairs; the reason becomes a comment above the name."""
    path.write_text("".join(f"# {reason}\n{name}\n" for name, reason in reasons), encoding="utf-8")
